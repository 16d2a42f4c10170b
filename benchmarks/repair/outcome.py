"""What came of a run to which a method was applied."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Outcome:
    """What came of a run. ``errors`` are a training's own measures: train and test error, or accuracy, or the last loss.

    ``final`` is the median of the last tenth of the losses (of those that are finite, where all parameters are), ``touched``
    the number of steps that were changed, ``stopped`` the step of a `TrainingUnstableError`, ``finite`` whether all
    parameters were at the end, ``alarms`` the incidents of warning or worse, ``bits`` a digest of all losses and of the
    weights and buffers at the end. A program that holds data out is judged by them: ``final`` is the loss on them,
    ``unlearned`` that of before they were learned from, ``metric`` the program's own measure.
    """

    steps: int
    final: float
    nonfinite: int | None
    stopped: int | None
    finite: bool
    touched: int = 0
    told: tuple[str, ...] = ()
    errors: tuple[float, ...] = ()
    alarms: tuple[str, ...] = ()
    bits: str = ""
    unlearned: float | None = None
    metric: float | None = None

    @property
    def ended_well(self) -> bool:
        """True when it ended finite, or in the stop with finite parameters."""
        return self.finite and (self.stopped is not None or math.isfinite(self.final))


def bits_of(losses: Any, model: nn.Module) -> str:
    """Return a digest of losses, weights and buffers, in which no bit can differ unseen."""
    digest = hashlib.sha256(losses.tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
