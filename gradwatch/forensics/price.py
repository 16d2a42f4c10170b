"""Whether keeping the inputs of each step is worth the time that it takes, decided after the first steps."""

from __future__ import annotations

import statistics
from itertools import pairwise

_TIMED = 20  # steps
_QUICK = 1e-3 / 3  # seconds from a forward to its backward, in a step that is too short for a capture
_PART = 0.5  # of the share of the training time that watching may take; the rest is for measuring


class Price:
    """Compares what keeping takes with the steps that it is done in.

    Args:
        share: share of the training time that watching may take; None: only short steps are too short.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._began: list[float] = []
        self._forward: list[float] = []
        self._took: list[float] = []

    @property
    def known(self) -> bool:
        """True if enough steps were timed."""
        return len(self._began) >= _TIMED

    def add(self, began: float, forward: float, took: float) -> None:
        """Add a step, in seconds: when its forward began, how long it was to the backward, and what keeping took of that."""
        self._began.append(began)
        self._forward.append(forward)
        self._took.append(took)

    @property
    def too_high(self) -> bool:
        """True if the steps that were timed are too short."""
        if statistics.median(self._forward) < _QUICK:
            return True
        steps = [later - earlier for earlier, later in pairwise(self._began)]
        return self._share is not None and statistics.median(self._took) > _PART * self._share * statistics.median(
            steps
        )
