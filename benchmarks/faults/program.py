"""What a program of the fault set is, and what is recorded of one run of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

Family = Literal[
    "learning rate",
    "recurrent",
    "initialisation",
    "activations",
    "precision",
    "numerics",
    "data",
    "transformers",
    "optimizer state",
    "injected",
    "plain bugs",
    "adversarial and reinforcement",
    "healthy",
]


class Done(Exception):  # noqa: N818  no error: the run has all its steps
    """The run has made all its steps."""


class Watcher(Protocol):
    """Who looks at a run: the recorder, or a detector."""

    def watch(self, model: nn.Module) -> None:
        """The model is built; training is about to begin."""

    def step(self, loss: float) -> None:
        """An optimizer step was made; its gradients are still there."""


class HeldOut(NamedTuple):
    """How good a model is on data that it was not trained on.

    Args:
        loss: the loss, smaller is better.
        metric: the program's own measure of its rare part, larger is better, 1 is the best.
    """

    loss: float
    metric: float


class Run:
    """One run of a program, which calls `watch` once and `step` after each optimizer step.

    Args:
        seed: everything random is drawn after it was set.
        steps: optimizer steps; then `Done` is raised out of `step`.
        watcher: who looks.
    """

    def __init__(self, seed: int, steps: int, watcher: Watcher) -> None:
        self.seed = seed
        self.steps = steps
        self.made = 0
        self.before: HeldOut | None = None
        self._watcher = watcher
        self._judge: Callable[[], HeldOut] | None = None

    def judged_by(self, judge: Callable[[], HeldOut]) -> None:
        """Say how good the model is on data held out; it is asked now and at the end, and may draw nothing of the run."""
        self._judge, self.before = judge, judge()

    def held_out(self) -> HeldOut | None:
        """Return how good the model is now; None for a program that holds no data out."""
        return None if self._judge is None else self._judge()

    def watch(self, model: nn.Module) -> None:
        """Say that the model is built and training is about to begin."""
        self._watcher.watch(model)

    def step(self, loss: Tensor | float) -> None:
        """Say that an optimizer step was made with this loss; gradients must not have been cleared yet."""
        self._watcher.step(loss.item() if isinstance(loss, torch.Tensor) else loss)
        self.made += 1
        if self.made >= self.steps:
            raise Done


@dataclass(frozen=True)
class Program:
    """One training.

    Args:
        name: unique, in words.
        family: what kind of fault.
        faulty: the faulty program; for a healthy one, the program.
        twin: the repaired program; None for a healthy one.
        steps: optimizer steps, at most 400 where no metric is named.
        onset: the step from which the cause is present.
        symptoms: incident kinds that name what is to be seen in the faulty run.
        suspect: the faulty layer (a parameter name or the beginning of one), where there is one.
        why: one sentence: what the fault is and what repairs it, or why a healthy one tempts.
        metric: what is measured of the rare part of a healthy program, on data held out; empty where nothing is.
        chance: what that metric is for a model that learned nothing.
    """

    name: str
    family: Family
    faulty: Callable[[Run], None]
    twin: Callable[[Run], None] | None
    why: str
    steps: int = 300
    onset: int = 0
    symptoms: tuple[str, ...] = ()
    suspect: str | None = None
    metric: str = ""
    chance: float = 0.0


def healthy(name: str, train: Callable[[Run], None], why: str, steps: int = 300) -> Program:
    """A program of the family that has nothing wrong."""
    return Program(f"healthy: {name}", "healthy", train, None, why, steps)


def rare(
    name: str, train: Callable[[Run], None], why: str, metric: str, chance: float = 0.0, steps: int = 2000
) -> Program:
    """A healthy program whose rare part is measured on data held out."""
    return Program(f"healthy: {name}", "healthy", train, None, why, steps, metric=metric, chance=chance)


def run_program(train: Callable[[Run], None], seed: int, steps: int, watcher: Watcher) -> Run:
    """Run one program to its end and return the run; errors that its own fault raises end it early."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  programs may use either
    run = Run(seed, steps, watcher)
    try:
        train(run)
    except Done:
        return run
    raise AssertionError(f"the program ended after {run.made} of {steps} steps without being told to")


@dataclass
class Trace:
    """What an unwatched run left: the input of all baselines, and of labels by outcome.

    ``losses`` (T,), ``grad_norm`` (T, L), ``weight_norm`` (T, L) after each step, ``first_weight_norm`` (L,); NaN where there
    is no gradient, which ``absent`` (T, L) tells from NaN in one.
    """

    layers: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norm: list[list[float]] = field(default_factory=list)
    weight_norm: list[list[float]] = field(default_factory=list)
    absent: list[list[bool]] = field(default_factory=list)
    first_weight_norm: list[float] = field(default_factory=list)
    _parameters: list[nn.Parameter] = field(default_factory=list, repr=False)

    def watch(self, model: nn.Module) -> None:
        """See `Watcher`."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.layers, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.first_weight_norm = [_norm(parameter) for parameter in self._parameters]

    def step(self, loss: float) -> None:
        """See `Watcher`."""
        self.losses.append(loss)
        with torch.no_grad():
            self.absent.append([parameter.grad is None for parameter in self._parameters])
            self.grad_norm.append([_norm(parameter.grad) for parameter in self._parameters])
            self.weight_norm.append([_norm(parameter) for parameter in self._parameters])


def _norm(tensor: Tensor | None) -> float:
    if tensor is None:
        return float("nan")
    return float(
        torch.linalg.vector_norm(
            tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach(), dtype=torch.float64
        )
    )
