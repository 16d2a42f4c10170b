"""How many forwards went through the running statistics for each backward since the last step, and whether that is usual.

A step's forwards are those that its optimizer usually makes between two steps: one for each backward, two where a block is
computed anew, more where several batches meet in one loss. One more now and then is not the step's: a validation that forgot
``eval()``, a look at the outputs. What the statistics were after it and before the step's own forwards is not known.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 2  # steps of one optimizer: what came with none of them is not usual


class Forwards:
    """Counts of forwards, as torch counts changes of what forwards alone write, and of backwards."""

    def __init__(self) -> None:
        self._usual: dict[int, deque[tuple[int, int]]] = {}
        self._changes = self._backwards = 0

    def begin(self, changes: int, backwards: int) -> None:
        """What comes from here on belongs to the next step; both numbers are counts so far."""
        self._changes, self._backwards = changes, backwards

    def took(self, optimizer: int, changes: int, backwards: int) -> bool:
        """A step of this optimizer comes; return whether it took as many forwards as its last ones."""
        now = changes - self._changes, backwards - self._backwards
        known = self._usual.setdefault(optimizer, deque(maxlen=_REMEMBERED))
        usual = not known or any(now[0] * then[1] == then[0] * now[1] for then in known)
        known.append(now)
        return usual
