"""What the healthy programs share whose signal is rare, bursty or changes scale by design."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.program import HeldOut, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from benchmarks.faults.program import Run

HELD_OUT = 999  # the seed of what is held out: no run draws from it


def unseen() -> torch.Generator:
    """Return the generator of data held out, at its beginning."""
    return torch.Generator().manual_seed(HELD_OUT)


def to_zero(optimizer: Optimizer, run: Run) -> LRScheduler:
    """The rate goes down in a line to nothing at the end of the run."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / run.steps)


def classified(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> HeldOut:
    """The loss of these, and the recall of the ones in ``y`` at a logit of 0."""
    with torch.no_grad():
        logits = model(x)
        return HeldOut(loss(logits, y).item(), (logits[y > 0] > 0).float().mean().item())


def explained(out: Tensor, y: Tensor) -> float:
    """The share of the variance that is explained; below zero it is worse than the mean."""
    return 1 - ((out - y).square().mean() / y.var(correction=0)).item()


def correct(logits: Tensor, y: Tensor) -> HeldOut:
    """The cross-entropy, and the share of rows whose largest logit is that of their class."""
    return HeldOut(functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item())


def rare(
    name: str, train: Callable[[Run], None], why: str, metric: str, chance: float = 0.0, steps: int = 2000
) -> Program:
    """A healthy program whose rare part is measured on data held out."""
    return Program(f"healthy: {name}", "healthy", train, None, why, steps, metric=metric, chance=chance)
