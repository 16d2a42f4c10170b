"""How good a model is on data that no run draws from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.faults.program import HeldOut

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

HELD_OUT = 999  # the seed of what is held out: no run draws from it


def unseen() -> torch.Generator:
    """Return the generator of data held out, at its beginning."""
    return torch.Generator().manual_seed(HELD_OUT)


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
