"""The measuring interval that keeps watching within a share of the training time."""

from __future__ import annotations

import math
from time import perf_counter

_FIRST_ROWS = 64  # rows measured at every step, whatever they cost: early explosions happen here
_LOOK_AFTER = 8  # rows between two decisions
_LONGEST = 64  # largest interval


class Budget:
    """Chooses ``every``, the number of optimizer steps between rows.

    Args:
        share: share of the training time that watching may take.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._then: tuple[float, float, int, int] | None = None
        self._every = 1

    def every(self, seconds: float, steps: int, rows: int) -> int:
        """Return the number of optimizer steps between rows.

        Args:
            seconds: time that watching has taken so far.
            steps: number of steps so far.
            rows: number of rows so far.
        """
        if rows < _FIRST_ROWS:
            return 1
        now = perf_counter()
        if self._then is None:
            self._then = now, seconds, steps, rows
        then, seconds_then, steps_then, rows_then = self._then
        if rows - rows_then >= _LOOK_AFTER and steps > steps_then:
            row = (seconds - seconds_then) / (rows - rows_then)
            step = (now - then - (seconds - seconds_then)) / (steps - steps_then)
            self._every = min(max(math.ceil(row / (self.share * step)), 1), _LONGEST) if step > 0 else _LONGEST
            self._then = now, seconds, steps, rows
        return self._every
