"""The choice of the rows that keep the norms of each layer, so that a log of a million steps stays small.

Every row keeps its loss, its global norm, its clip coefficient, its learning rate, its loss scale and whether it was skipped. The
norms of the layers are kept for the first 1,000 rows of a session, for the last 5,000 rows of the log, for 200 steps before and
after the opening and the closing of an incident, and otherwise for every eighth row; among these are the rows at which a quiet
run samples its weights. Of more than 200 incidents, only the first 200 are considered.
"""

from __future__ import annotations

FIRST = 1000
LAST = 5000
AROUND = 200
EACH = 8
_MOST_INCIDENTS = 200


class Thinning:
    """The choice of the rows to keep in one session."""

    def __init__(self) -> None:
        self._rows = 0
        self._until = -1
        self._seen: set[tuple[int, bool]] = set()

    def copy(self) -> Thinning:
        """Return an independent copy."""
        other = Thinning()
        other._rows, other._until, other._seen = self._rows, self._until, set(self._seen)
        return other

    def take(self, step: int) -> bool:
        """Count a row, and return whether it keeps its norms once it is older than the last 5,000."""
        self._rows += 1
        # rows are numbered from 1, since rules judge and weights are sampled at multiples of 16 and 32
        return self._rows <= FIRST or self._rows % EACH == 0 or step <= self._until

    def around(self, number: int, step: int, *, closed: bool) -> tuple[int, int] | None:
        """Return the range of steps to keep for an incident that opened or closed at ``step``; None if it is known already."""
        if (number, closed) in self._seen or number >= _MOST_INCIDENTS:
            return None
        self._seen.add((number, closed))
        self._until = max(self._until, step + AROUND)
        return step - AROUND, step + AROUND
