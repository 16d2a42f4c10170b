"""Decides on the device, before a row has arrived on the host, whether the gradients of a step surge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradwatch import device

if TYPE_CHECKING:
    from torch import Tensor

_WINSOR = math.log(4.0)
_RATE = 1.0 - 0.5 ** (1.0 / 64)
_SETTLED = 8  # norms needed before a step can be a surge


class SurgeDetector:
    """Decides whether the gradients of a step surge, before any rule has seen them.

    It keeps the typical global norm ``b`` on the device as `gradwatch.history.statistics.Typical` does on the host: an
    exponential average of logarithms that moves by at most log 4 per step and ignores zero, NaN and Inf.

    Args:
        home: the device.

    Attributes:
        home: the device.
    """

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self._log = torch.zeros((), dtype=device.widest_float(home), device=home)
        self._seen = torch.zeros((), dtype=device.widest_float(home), device=home)

    def fires(self, norm: Tensor, loss: Tensor, *, limit: float, far: float, loss_ceiling: float) -> Tensor:
        """Return whether a step surges, as a bool tensor without dimensions.

        Args:
            norm: global norm of the step.
            loss: loss of the step; NaN if none was seen, which counts as above the ceiling.
            limit: multiple of the typical norm above which it surges if the loss is above its ceiling.
            far: multiple of the typical norm above which it surges whatever the loss.
            loss_ceiling: usual upper bound of the loss.
        """
        surge = torch.where(self._seen >= _SETTLED, norm * torch.exp(-self._log), 0.0)
        return (surge > far) | ((surge > limit) & ~(loss <= loss_ceiling))

    def learn(self, norm: Tensor) -> None:
        """Update the typical norm with the global norm of a step."""
        use = (norm > 0) & (norm < torch.inf)
        self._seen += use
        step = torch.where(use, torch.log(norm) - self._log, 0.0)
        step = torch.where(self._seen > 1, step.clamp(-_WINSOR, _WINSOR), step)
        self._log += step * torch.clamp(1.0 / self._seen.clamp(min=1.0), min=_RATE)
