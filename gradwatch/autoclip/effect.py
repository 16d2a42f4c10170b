"""The effect of a clip on the losses of the steps that it clips, compared with the steps that it does not clip.

If a signal is rare, the clip bites on the few steps that carry it. They learn less and their losses stay high or rise, while all
other losses are fine: the clip is then the fault. In an explosion the other losses are high as well, or the clip bites on most
steps.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradwatch.autoclip.limits import AutoClipLimits


class ClipEffect:
    """The losses since a clip was switched on.

    Args:
        well_below: level up to which a loss counts as recovered.
        limits: the limits of auto-clip.
    """

    def __init__(self, well_below: float, limits: AutoClipLimits) -> None:
        self._well_below = well_below
        self._compared, self._falls, self._bites = limits.compared, limits.falls, limits.bites
        self._steps = self._clipped = 0
        self._first: list[float] = []
        self._late: deque[tuple[float, float]] = deque(maxlen=limits.compared)
        self._others: deque[float] = deque(maxlen=limits.compared)

    def take(self, loss: float, norm: float, *, clipped: bool) -> None:
        """Record one step: the loss that its gradients came from, their global norm, and whether they were clipped.

        A loss that is not finite is ignored.
        """
        if not math.isfinite(loss):
            return
        self._steps += 1
        self._clipped += clipped
        if not clipped:
            self._others.append(loss)
        elif len(self._first) < self._compared:
            self._first.append(loss)
        else:
            self._late.append((loss, norm))

    @property
    def largest_norm(self) -> float:
        """The largest global norm among the last clipped steps; 0.0 if there are none."""
        return max((norm for _, norm in self._late), default=0.0)

    @property
    def unlearned(self) -> tuple[float, float] | None:
        """The first and the latest level of the clipped steps' losses if the clip keeps them from being learned, else None.

        The clip does so if these losses are high and have not come down, while those of the other steps, which are most of them,
        have recovered.
        """
        if (
            self._clipped > self._bites * self._steps
            or len(self._late) < self._compared
            or len(self._others) < self._compared
            or float(np.median(self._others)) > self._well_below
        ):
            return None
        before, now = float(np.median(self._first)), float(np.median([loss for loss, _ in self._late]))
        return (before, now) if now > max(self._well_below, self._falls * before) else None
