"""Which rows keep their numbers for each layer, so that a log of a million steps stays small.

Every row keeps its loss, global norm, clip coefficient and whether it was skipped. The numbers for each layer stay for the
first 1,000 rows of a session, the last 5,000 of the log, from 200 steps before an incident opens to 200 after it, as long
around its end, and for each eighth row elsewhere; those are the rows at which a quiet run samples its weights. A run with
more than 200 incidents keeps the surroundings of the first 200.
"""

from __future__ import annotations

FIRST = 1000
LAST = 5000
AROUND = 200
EACH = 8
_MOST_INCIDENTS = 200


class Thinning:
    """The choice for one session."""

    def __init__(self) -> None:
        self._rows = 0
        self._until = -1
        self._seen: set[tuple[int, bool]] = set()

    def copy(self) -> Thinning:
        """Return one that changes by itself."""
        other = Thinning()
        other._rows, other._until, other._seen = self._rows, self._until, set(self._seen)
        return other

    def take(self, step: int) -> bool:
        """Take note of a row and say whether it stays once it is older than the last 5,000."""
        self._rows += 1
        # the number of the row counts from 1: rules judge, and weights are sampled, at multiples of 16 and 32
        return self._rows <= FIRST or self._rows % EACH == 0 or step <= self._until

    def around(self, number: int, step: int, *, closed: bool) -> tuple[int, int] | None:
        """An incident opened or closed at ``step``: return the steps that stay for it; None when it is known already."""
        if (number, closed) in self._seen or number >= _MOST_INCIDENTS:
            return None
        self._seen.add((number, closed))
        self._until = max(self._until, step + AROUND)
        return step - AROUND, step + AROUND
