"""What a quiet step may do, by counts that do not drift as times do."""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.runlog.recording import Recording
from tests.trainings import data, mlp

PACKAGE = str(Path(gradwatch.__file__).parent)
CALLS = 56  # Python functions of gradwatch in one quiet step, whatever the number of layers
CAPTURED = 96  # the same where the inputs of a step are kept
OPERATIONS = 5  # of torch in one quiet step: batched norm, stack, its copy, and detaching and reading the loss


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def quiet_steps(
    depth: int,
    *,
    watched: bool,
    measure: Any,
    count: int = 10,
    log: Path | None = None,
    forensics: bool = False,
    arguments: tuple[None, ...] = (),
) -> Any:
    """Train 96 steps, then ``count`` quiet ones under ``measure``, a context manager; ``arguments`` are those of each step."""
    model = mlp(depth=depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = data()
    settings: Any = {"clip": "norm", "report": None, "log": log, "strict": True, "forensics": forensics}
    monitor = gradwatch.attach(model, **settings) if watched else None

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step(*arguments)

    for _ in range(97):  # row 96 is one of those at which the weights are sampled and all rules judge
        step()
    with measure:
        for _ in range(count):
            step()
    if monitor is not None:
        monitor.detach()
    return measure


@pytest.mark.parametrize("depth", [10, 40])
def test_a_quiet_step_is_a_handful_of_operations(depth: int) -> None:
    """One batched norm, one stack, and reading them; not one for each layer."""
    watched = quiet_steps(depth, watched=True, measure=Operations()).count
    plain = quiet_steps(depth, watched=False, measure=Operations()).count
    assert 0 < (watched - plain) / 10 <= OPERATIONS


class Calls:
    """Counts calls of gradwatch's functions."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        sys.setprofile(self._see)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: Any, event: str, _: Any) -> None:
        self.count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)


def test_a_quiet_step_calls_as_many_functions_whatever_the_number_of_layers() -> None:
    """And not many."""
    few, many = (quiet_steps(depth, watched=True, measure=Calls()).count / 10 for depth in (10, 40))
    assert few == many
    assert 0 < few <= CALLS


def test_a_step_without_a_closure_costs_the_same_if_it_says_so() -> None:
    """By ``step(None)``, as an accelerator calls it; two calls more, which ask whether a checkpoint does."""
    plain = quiet_steps(10, watched=True, measure=Calls()).count / 10
    explicit = quiet_steps(10, watched=True, measure=Calls(), arguments=(None,)).count / 10
    assert explicit == plain + 2


def test_keeping_the_inputs_of_a_step_takes_as_many_calls_whatever_the_number_of_layers() -> None:
    """And one operation more: the copy of the gradient of the output."""
    few, many = (quiet_steps(depth, watched=True, measure=Calls(), forensics=True).count / 10 for depth in (10, 40))
    assert few == many
    assert CALLS < few <= CAPTURED
    kept = quiet_steps(10, watched=True, measure=Operations(), forensics=True).count
    assert kept - quiet_steps(10, watched=True, measure=Operations()).count <= 10


def test_a_run_log_adds_no_call_to_a_quiet_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are taken out of the ring together, twice a second."""
    monkeypatch.setattr(Recording, "period", math.inf)  # these ten steps may last half a second here
    without = quiet_steps(10, watched=True, measure=Calls()).count
    assert quiet_steps(10, watched=True, measure=Calls(), log=tmp_path).count == without


class Kept:
    """Counts memory blocks that are left behind."""

    def __init__(self) -> None:
        self.blocks = 0

    def __enter__(self) -> None:
        gc.collect()
        self.blocks = -sys.getallocatedblocks()

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self.blocks += sys.getallocatedblocks()


def test_steps_leave_nothing_behind() -> None:
    """Over 800 steps fewer memory blocks stay than there are steps, with 20 layers as with 80."""
    for depth in (10, 40):
        assert quiet_steps(depth, watched=True, measure=Kept(), count=800).blocks < 400


def test_the_ring_is_bounded() -> None:
    """At 300 layers it takes less than 16 MB, at 30,000 it is shorter."""
    from gradwatch.history.history import History

    for layers in (300, 30_000):
        history = History([str(number) for number in range(layers)])
        size = sum(array.nbytes for array in vars(history).values() if hasattr(array, "nbytes"))
        assert size < (16 * 2**20 if layers == 300 else 64 * 16 * layers + 40 * 8 * layers)
