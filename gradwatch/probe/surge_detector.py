"""Decides on the device, before a row has come over, whether a step's gradients surge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradwatch import device

if TYPE_CHECKING:
    from torch import Tensor

_WINSOR = math.log(4.0)
_RATE = 1.0 - 0.5 ** (1.0 / 64)
_SETTLED = 8  # norms before which nothing is a surge


class SurgeDetector:
    """Decides about a step that no rule has seen yet: whether its gradients surge, whether they may be used at all.

    Keeps the typical global norm ``b`` on the device as `gradwatch.history.statistics.Typical` does on the host: an exponential
    average of logs, moved by at most log 4 a step, that takes no zero, NaN or Inf.
    """

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self._log = torch.zeros((), dtype=device.precise(home), device=home)
        self._seen = torch.zeros((), dtype=device.precise(home), device=home)

    def fires(self, norm: Tensor, loss: Tensor, *, limit: float, far: float, loss_ceiling: float) -> Tensor:
        """Return whether this step surges, as bool without dimensions.

        It does ``far`` times beyond the usual, or ``limit`` times beside a loss above its ceiling.
        ``loss`` is NaN where none was seen: then nothing speaks for the run.
        """
        surge = torch.where(self._seen >= _SETTLED, norm * torch.exp(-self._log), 0.0)
        return (surge > far) | ((surge > limit) & ~(loss <= loss_ceiling))

    def learn(self, norm: Tensor) -> None:
        """Let the typical norm follow."""
        log = torch.log(norm)
        use = torch.isfinite(log)
        self._seen += use
        step = torch.where(use, log - self._log, 0.0)
        step = torch.where(self._seen > 1, step.clamp(-_WINSOR, _WINSOR), step)
        self._log += step * torch.clamp(1.0 / self._seen.clamp(min=1.0), min=_RATE)
