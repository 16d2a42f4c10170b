"""Steps after one whose origin was not found: each of their operations is watched, in case they fail again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import gradwatch
from benchmarks.forensics import causes as failing
from benchmarks.forensics.causes import CAUSES
from gradwatch.forensics import ops
from gradwatch.forensics.inspector import Inspector

if TYPE_CHECKING:
    from collections.abc import Callable

EXP = CAUSES["deviation of an encoder"]  # whose graph keeps too little


remembered: list[float] = []


def remember(loss: Tensor) -> Tensor:
    """Remember a loss, and return one that depends on what is remembered, so that its source does more than compute."""
    remembered.append(loss.item())
    return loss + 0.0 * len(remembered)


class Recurrent(nn.Module):
    """An LSTM with dropout and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(failing.WIDTH, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, failing.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.head(self.norm(self.lstm(x[:, None])[0][:, -1]))
        return result


def train(
    bad: Callable[[int], bool], *, steps: int = 8, watch: bool = True, model: nn.Module | None = None, **settings: Any
) -> tuple[gradwatch.Monitor | None, list[Tensor]]:
    """Train, leaving out steps whose loss is not finite; return the monitor and everything that remains."""
    torch.manual_seed(0)
    model = model or nn.Linear(failing.WIDTH, failing.WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings = {"report": None, "strict": True, "forensics": True} | settings
    monitor = gradwatch.attach(model, **settings) if watch else None
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        out = model(torch.randn(failing.ROWS, failing.WIDTH))
        loss = remember(EXP.run(out).mean() if bad(step) else out.pow(2).mean())
        loss.backward()
        losses.append(loss.detach())
        if loss.isfinite() or "clip" in settings:
            optimizer.step()
    assert _get_current_dispatch_mode_stack() == []
    if monitor is not None:
        monitor.detach()
    return monitor, [*losses, *model.state_dict().values(), torch.get_rng_state()]


def test_a_step_that_fails_again_is_named_with_its_line() -> None:
    """The first one was not: its graph does not keep enough."""
    monitor, _ = train(lambda step: step in (2, 4), clip="norm")
    assert monitor is not None
    found = next(one.origin for one in monitor.incidents if one.origin is not None)
    assert (found.op, found.part, found.found_by, found.rows) == ("exp", "loss code", "watched step", EXP.rows)
    assert found.line in EXP.lines


class Carried(nn.Module):
    """A recurrent cell that is given its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.cell(x, state)
        return result


class Spoiling:
    """Makes NaN in a way of which no graph and no source says anything, in one call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: Tensor) -> Tensor:
        """Count, and add NaN."""
        self.calls += 1
        return state + torch.full_like(state, torch.nan if self.calls == 2 else 0.0)


@pytest.mark.parametrize("clip", ["norm", None])
def test_what_a_step_has_left_that_was_not_explained_is_not_named(clip: str | None) -> None:
    """Neither the weights that its update has damaged, nor a state that was carried on: both were finite before it."""
    torch.manual_seed(0)
    model, spoil, state = Carried(), Spoiling(), torch.zeros(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gradwatch.attach(model, report=None, strict=True, forensics=True, clip=clip)
    for _ in range(6):
        optimizer.zero_grad()
        state = spoil(model(torch.randn(5, 3), state))
        state.mean().backward()
        optimizer.step()
        state = state.detach()
    monitor.detach()
    assert spoil.calls == 6
    assert [one.kind for one in monitor.incidents] == ["nonfinite"]
    assert monitor.incidents[0].origin is None


def test_a_weight_that_is_damaged_after_the_trouble_is_over_is_named() -> None:
    """A step that was well lies between."""
    torch.manual_seed(0)
    model, spoil = nn.Linear(3, 4), Spoiling()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gradwatch.attach(model, report=None, strict=True, forensics=True, clip="norm")
    for step in range(60):
        optimizer.zero_grad()
        if step == 50:
            with torch.no_grad():
                model.bias[1] = torch.nan
        spoil(model(torch.randn(5, 3))).mean().backward()
        optimizer.step()
    monitor.detach()
    found = next(one.origin for one in monitor.incidents if one.origin is not None)
    assert (found.subject, found.name, found.step) == ("weight", "bias", 50)


def test_a_step_long_after_is_not_watched() -> None:
    """Four steps are, so that a training is not slowed for good."""
    on = []
    begins = Inspector._forward_begins

    def count(self: Inspector, *args: Any) -> None:
        begins(self, *args)
        on.append(self.watching)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspector, "_forward_begins", count)
        train(lambda step: step == 2, steps=20)
    assert [step for step, is_on in enumerate(on) if is_on] == [3, 4, 5, 6]


@pytest.mark.parametrize("make", [Recurrent, lambda: nn.Linear(failing.WIDTH, failing.WIDTH)])
def test_a_training_with_watched_steps_is_bit_identical(make: Callable[[], nn.Module]) -> None:
    """Losses, weights, buffers and the generator."""

    def run(*, watch: bool) -> list[Tensor]:
        torch.manual_seed(1)
        return train(lambda step: step in (2, 4), watch=watch, model=make())[1]

    for one, other in zip(run(watch=True), run(watch=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("function", ["changed_by", "copied", "is_view"])
def test_an_error_while_an_operation_is_prepared_does_not_reach_the_training(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is no memory for a copy of what it changes in place."""

    def run(*, watch: bool) -> list[Tensor]:
        torch.manual_seed(1)
        return train(lambda step: step == 2, watch=watch, model=Recurrent(), strict=False)[1]

    unwatched = run(watch=False)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ops, function, fails)
    for one, other in zip(run(watch=True), unwatched, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Counting(TorchDispatchMode):
    """A mode of the program."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_program_is_entered_and_left_as_without_it() -> None:
    """Also one that is entered while a step is watched and left later, or around the model alone."""
    model = nn.Linear(failing.WIDTH, failing.WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        for step in range(5):
            optimizer.zero_grad()
            x, mode = torch.randn(failing.ROWS, failing.WIDTH), Counting()  # type: ignore[no-untyped-call]
            if step == 2:
                out = model(x)
                with mode:
                    loss = remember(EXP.run(out).mean())
                    loss.backward()
                    assert _get_current_dispatch_mode_stack() == [mode]
            elif step == 3:
                with mode:
                    loss = model(x).mean()
                assert _get_current_dispatch_mode_stack() == []
                loss.backward()
            else:
                loss = remember((EXP.run(model(x)) if step == 1 else model(x)).mean())
                loss.backward()
            if loss.isfinite():
                optimizer.step()
        assert monitor._inspector is not None
    assert _get_current_dispatch_mode_stack() == []
