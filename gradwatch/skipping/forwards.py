"""The number of forwards through running statistics for each backward since the last step, compared with the usual number.

An optimizer usually makes the same number of forwards for each of its steps: one per backward, two if activations are
recomputed, more if one loss combines several batches. An additional forward does not belong to the step, for example one of a
validation without ``eval()``. The values of the statistics after it and before the step's own forwards are not known.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 2  # steps of one optimizer with which the number of forwards is compared


class Forwards:
    """The numbers of forwards and backwards between the steps of each optimizer.

    Forwards are counted by the versions of buffers that only forwards write.
    """

    def __init__(self) -> None:
        self._usual: dict[int, deque[tuple[int, int]]] = {}
        self._changes = self._backwards = 0

    def begin(self, changes: int, backwards: int) -> None:
        """Begin the next step, given the total numbers of changes and of backwards so far."""
        self._changes, self._backwards = changes, backwards

    def took(self, optimizer: int, changes: int, backwards: int) -> bool:
        """Return True if the coming step has as many forwards per backward as one of the optimizer's last two steps.

        Also returns True for the first step of an optimizer.

        Args:
            optimizer: the identity of the optimizer.
            changes: total number of changes so far.
            backwards: total number of backwards so far.
        """
        now = changes - self._changes, backwards - self._backwards
        known = self._usual.setdefault(optimizer, deque(maxlen=_REMEMBERED))
        usual = not known or any(now[0] * then[1] == then[0] * now[1] for then in known)
        known.append(now)
        return usual
