"""How often to measure so that watching stays within a share of the training's time."""

from __future__ import annotations

import math
from time import perf_counter

_FIRST_ROWS = 64  # measured on each step, whatever they cost: what explodes at once does so here
_LOOK_AFTER = 8  # rows between two decisions
_LONGEST = 64  # steps without a row at most


class Budget:
    """Chooses ``every``: optimizer steps between rows.

    Args:
        share: of the training's time that watching may take.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._then: tuple[float, float, int, int] | None = None
        self._every = 1

    def every(self, seconds: float, steps: int, rows: int) -> int:
        """Return how many steps shall lie between rows.

        ``seconds`` is what watching took so far, ``steps`` and ``rows`` are those made so far.
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
