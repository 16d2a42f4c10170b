"""What tempts processes to decide otherwise: short trainings of two processes, run one after the other, each leaving JSON.

Run as ``python -m tests.torchrun 2 tests.together FOLDER``.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import device
from gradwatch.clips.base import OneFactor
from gradwatch.measure.sampling import Sampling
from gradwatch.rules import GradientSurge, default_rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.clips import Step, UnreadStep
    from gradwatch.history.history import History

SCENES: dict[str, Callable[[], dict[str, Any]]] = {}
FREE = device.reading_is_free
STEPS = 40
SUDDEN = 20  # the step from which the loss is twenty times as large


def scene(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Add a scene under its function's name."""
    SCENES[make.__name__] = make
    return make


def on_both(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Add a scene twice, the second time by the path for devices."""

    def later() -> dict[str, Any]:
        device.reading_is_free = lambda _: False  # type: ignore[assignment]
        return make()

    SCENES[make.__name__] = make
    SCENES[f"{make.__name__}_later"] = later
    return make


def trained(
    steps: int = STEPS,
    sudden: float = 20.0,
    rate: float = 0.05,
    each: Callable[[int, nn.Module], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    *,
    fused: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train in two processes; ``each`` is called before each optimizer step. On devices only ``fused`` ones can be left out."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=fused)
    monitor = gradwatch.attach(model, report=settings.pop("report", None), **settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator)
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y) * (sudden if step >= SUDDEN else 1.0)
        (scaler.scale(loss) if scaler is not None else loss).backward()
        if each is not None:
            each(step, inner)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    monitor.detach()
    clipping = monitor._pipeline.clipping
    return {
        "parameters": [p.detach().flatten().tolist() for p in inner.parameters()],
        "steps": monitor.history.steps().tolist(),
        "notes": monitor.notes,
        "clipped": clipping.clipped if clipping else None,
        "skipped": np.flatnonzero(monitor.history.skipped()).tolist(),
        "incidents": [[i.kind, i.opened_step, i.severity] for i in monitor.incidents],
        "processes": monitor.history.provenance.processes,
    }


class Mine(gradwatch.Rule):
    """Fires from a step on, and opens an incident by itself; may raise, or fire, in one process alone."""

    code: ClassVar[str] = "MY001"
    name: ClassVar[str] = "mine"
    sign: ClassVar[Any] = "subtle"
    kind: ClassVar[Any] = "diverging"
    per_layer: ClassVar[bool] = False
    limit: float = 1.0
    raises_at: int = -1
    raises_on: int = -1
    only_on: int = -1

    def __init__(self, **settings: Any) -> None:
        # where and when it fails is the test's business, and no setting of the rule
        super().__init__(limit=settings.pop("limit", 1.0))
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def measure(self, history: History) -> Any:
        """Return 50 from the sudden step on."""
        if dist.get_rank() == self.raises_on and history.row.step == self.raises_at:
            raise RuntimeError("in this process alone")
        here = self.only_on in (-1, dist.get_rank())
        return np.array([50.0 * (history.row.step >= SUDDEN and here)])


class Halves(OneFactor):
    """A clip of the user's own: a half of each gradient; may raise in one process alone."""

    takes_threshold: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []
    fails: ClassVar[tuple[str, int, int]] = ("", 0, 0)  # which function, on which call, on which rank
    hook: Any = None

    def _count(self, name: str) -> None:
        if self.fails[0] == name:
            self.calls.append(1)
            if (len(self.calls), dist.get_rank()) == self.fails[1:]:
                raise RuntimeError("in this process alone")

    def factor(self, global_norm: float) -> float:
        """See `OneFactor.factor`."""
        return 0.5

    def factor_of(self, global_norm: Tensor) -> Tensor:
        """See `OneFactor.factor_of`."""
        return torch.full_like(global_norm, 0.5)

    def apply(self, step: Step) -> float:
        """See `Clip.apply`."""
        left = super().apply(step)
        self._count("apply")
        return left

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """See `Clip.apply_unread`."""
        left = super().apply_unread(step)
        self._count("apply")
        return left

    def loosened(self, factor: float) -> Halves:
        """See `Clip.loosened`."""
        return self

    def at_norm(self, norm: float, history: History) -> Halves:
        """See `Clip.at_norm`."""
        self._count("at_norm")
        return self


class FailingReport(gradwatch.Report):
    """Fails at its first step, on rank 1."""

    def step(self, snapshot: Any) -> None:
        """Fail."""
        if dist.get_rank() == 1:
            raise OSError("in this process alone")

    def close(self, snapshot: Any) -> None:
        """Do nothing."""


def here(*values: Any) -> Any:
    """Return the value for this rank."""
    return values[dist.get_rank()]


# How often to measure.


@scene
def a_budget_by_clocks_that_run_apart() -> dict[str, Any]:
    """One process is slower than the other."""
    return trained(300, sudden=1.0, budget=0.02, each=lambda *_: time.sleep(here(0, 0.001)))


@scene
def a_different_every() -> dict[str, Any]:
    """Each step in one process, each third in the other."""
    return trained(every=here(1, 3))


@scene
def a_budget_in_one_process() -> dict[str, Any]:
    """And none in the other."""
    return trained(100, sudden=1.0, budget=here(0.01, None))


@scene
def an_incident_in_one_process_while_each_third_step_is_measured() -> dict[str, Any]:
    """By a rule that looks at what only this process knows."""
    return trained(60, every=3, sudden=1.0, rules=[*default_rules(), Mine(only_on=1)])


# Settings.


@scene
def an_auto_clip_in_one_process() -> dict[str, Any]:
    """And none in the other."""
    return trained(clip=here("norm", None))


@scene
def a_different_max_skips() -> dict[str, Any]:
    """With gradients that are NaN for longer than one of them bears."""

    def poison(step: int, model: nn.Module) -> None:
        if step >= SUDDEN:
            next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]

    return trained(clip=gradwatch.AutoClip("norm", max_skips=here(3, 20)), each=poison)


@scene
def different_thresholds_and_sets_of_rules() -> dict[str, Any]:
    """One more rule in one, another limit in the other."""
    rules = [rule for rule in default_rules() if rule.code != "GW301"]
    return trained(clip="norm", rules=[*rules, GradientSurge(limit=here(10.0, 30.0)), *here([Mine()], [])])


@scene
def the_same_settings_with_texts_of_their_own() -> dict[str, Any]:
    """A set, a function, an object: no text is the same in two processes, but the settings are."""
    things = ({"a", "b", "c", "d"}, lambda x: x, object(), [object()])
    return trained(clip=gradwatch.AutoClip(Halves(hook=things), hold=5), rules=[*default_rules(), Mine()])


# Failures in one process alone.


@on_both
def a_rule_that_does_not_fail() -> dict[str, Any]:
    """What the coming ones are compared with: it opens an incident, and auto-clip acts."""
    return trained(clip="norm", rules=[Mine()])


@on_both
def a_rule_that_fails_before() -> dict[str, Any]:
    """Before it would have fired."""
    return trained(clip="norm", rules=[Mine(raises_at=SUDDEN - 10, raises_on=1)])


@on_both
def a_rule_that_fails_as_it_fires() -> dict[str, Any]:
    """In the very step in which it fires in the other process."""
    return trained(clip="norm", rules=[Mine(raises_at=SUDDEN, raises_on=0)])


@on_both
def a_rule_that_fails_while_it_clips() -> dict[str, Any]:
    """After auto-clip was switched on by it."""
    return trained(60, clip="norm", rules=[Mine(raises_at=SUDDEN + 18, raises_on=1)])


@scene
def a_rule_that_says_otherwise_in_one_process() -> dict[str, Any]:
    """It does not fail, it looks at what only that process knows."""
    return trained(clip="norm", rules=[Mine(only_on=1)])


@on_both
def a_clip_that_fails_in_one_process() -> dict[str, Any]:
    """After it has changed the gradients."""
    Halves.calls.clear()
    Halves.fails = ("apply", 3, 1)
    found = trained(clip=gradwatch.AutoClip(Halves(), when="always"), fused=False)
    Halves.fails = ("", 0, 0)
    return found


@scene
def a_clip_whose_bound_fails_in_one_process() -> dict[str, Any]:
    """While the row is judged, in the step in which the incident opens."""
    Halves.calls.clear()
    Halves.fails = ("at_norm", 1, 0)
    found = trained(clip=gradwatch.AutoClip(Halves(), threshold=2.0), rules=[Mine()])
    Halves.fails = ("", 0, 0)
    return found


@scene
def gradwatch_fails_on_a_device_while_it_clips() -> dict[str, Any]:
    """The others know it eight steps later, and must not clip alone until then."""
    device.reading_is_free = lambda _: False  # type: ignore[assignment]
    original, calls = Sampling.take_unread, [0]

    def failing(self: Sampling, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if (calls[0], dist.get_rank()) == (10, 1):
            raise OSError("lost")
        return original(self, *args, **kwargs)

    Sampling.take_unread = failing  # type: ignore[method-assign]
    found = trained(clip=gradwatch.AutoClip(gradwatch.ClipNorm(0.01), when="always"))
    Sampling.take_unread = original  # type: ignore[method-assign]
    return found


@scene
def a_report_that_fails_in_one_process() -> dict[str, Any]:
    """It is that process's business."""
    return trained(clip="norm", rules=[Mine()], report=FailingReport())


# Steps that a gradient scaler leaves out.


def _overflow(ranks: tuple[int, ...]) -> Callable[[int, nn.Module], None]:
    def poison(step: int, model: nn.Module) -> None:
        if step in (5, 6) and dist.get_rank() in ranks:
            next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]

    return poison


@on_both
def a_scaler_that_leaves_a_step_out_in_one_process() -> dict[str, Any]:
    """The other makes it, and waits for the row."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    return trained(30, sudden=1.0, clip="norm", each=_overflow((1,)), scaler=scaler)


@on_both
def a_scaler_that_leaves_a_step_out_in_all_processes() -> dict[str, Any]:
    """As it is meant to be."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    return trained(30, sudden=1.0, clip="norm", each=_overflow((0, 1)), scaler=scaler)


def see() -> dict[str, Any]:
    """Play all scenes, or those whose names are given."""
    seen: dict[str, Any] = {}
    for name, made in SCENES.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        device.reading_is_free = FREE
        try:
            seen[name] = made()
        except Exception as error:
            seen[name] = {"raised": f"{type(error).__name__}: {error}"}
        dist.barrier()
    return seen
