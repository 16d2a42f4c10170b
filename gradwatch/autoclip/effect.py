"""What a clip does to the losses of the steps that it shortens, beside those of the steps that it leaves alone.

Where a signal is rare, the clip bites on the steps that carry it: they learn less, their losses stay up or rise, and all
other losses are well. Then the clip is the fault. In an explosion the others are not well either.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_FEW = 8  # losses of each kind that are compared
_FALLS = 0.9  # times its level before: a loss that comes down


class ClipEffect:
    """The losses since one clip was switched on.

    Args:
        well_below: the level below which a loss is as it was before.
    """

    def __init__(self, well_below: float) -> None:
        self._well_below = well_below
        self._first: list[float] = []
        self._late: deque[tuple[float, float]] = deque(maxlen=_FEW)
        self._others: deque[float] = deque(maxlen=_FEW)

    def take(self, loss: float, norm: float, *, clipped: bool) -> None:
        """Take one step: the loss that its gradients came from, their global norm, and whether they were clipped."""
        if not math.isfinite(loss):
            return
        if not clipped:
            self._others.append(loss)
        elif len(self._first) < _FEW:
            self._first.append(loss)
        else:
            self._late.append((loss, norm))

    @property
    def largest_norm(self) -> float:
        """The largest global norm of the last clipped steps."""
        return max((norm for _, norm in self._late), default=0.0)

    @property
    def unlearned(self) -> tuple[float, float] | None:
        """The level of the clipped steps' losses at first and of late, where the clip keeps them from being learned; else None.

        It does where they are up and have not come down, while the steps that were not clipped are well.
        """
        if len(self._late) < _FEW or len(self._others) < _FEW or float(np.median(self._others)) > self._well_below:
            return None
        before, now = float(np.median(self._first)), float(np.median([loss for loss, _ in self._late]))
        return (before, now) if now > max(self._well_below, _FALLS * before) else None
