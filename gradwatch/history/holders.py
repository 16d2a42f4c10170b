"""Which layers the optimizer of each row held, for trainings in which several optimizers step by turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.columns import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats

_MOST = 1024  # different sets of layers that are kept


class Holders:
    """The sets of trainable layers that the optimizers of the last ``window`` rows held, each stored once.

    Args:
        count: number of layers.
        window: number of rows.
    """

    def __init__(self, count: int, window: int) -> None:
        self._window = window
        self._sets = [np.zeros(count, dtype=bool)]
        self._of_row = np.zeros(window, dtype=np.int32)
        self._now = self._until = self._changed = 0

    def widen(self, count: int) -> None:
        """Extend the sets to ``count`` layers."""
        self._sets = [widened(one, count, 0) for one in self._sets]

    def follow(self, row: int, rate: Floats | None) -> None:
        """Record the learning rates from the row with number ``row`` on; rows before it have those of the last call."""
        if rate is None:
            return
        self._fill(row)
        held = np.isfinite(rate)
        if np.array_equal(held, self._sets[self._now]):
            return
        known = next((place for place, one in enumerate(self._sets) if np.array_equal(one, held)), len(self._sets))
        if known == _MOST:
            self._sets, self._of_row[:], known = [], 0, 0
        if known == len(self._sets):
            self._sets.append(held)
        self._now, self._changed = known, row

    def _fill(self, row: int) -> None:
        self._of_row[np.arange(max(self._until, row - self._window), row) % self._window] = self._now
        self._until = row

    def turns(self, rows: int, last: int) -> list[tuple[NDArray[np.bool_], NDArray[np.intp]]]:
        """Return what each of several optimizers holds that have made the ``last`` rows by turns, the one of the last row first.

        Args:
            rows: number of rows so far.
            last: number of rows to look at.

        Returns:
            For each, the layers, shape (L,), and the places of its rows among those that are kept, oldest first. Empty if one
            optimizer has made all of them, be it with other layers frozen.
        """
        if not rows or rows - self._changed >= last:  # one optimizer has made all of them
            return []
        self._fill(rows)
        ids = self._of_row[np.arange(max(0, rows - self._window), rows) % self._window]
        mine = self._sets[ids[-1]]
        recent = np.unique(ids[-last:]).tolist()
        others = [one for one in recent if self._sets[one].any() and not (self._sets[one] & mine).any()]
        if not others or not mine.any():
            return []
        return [(self._sets[one], np.flatnonzero(ids == one)) for one in (int(ids[-1]), *others)]
