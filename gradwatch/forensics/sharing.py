"""What the processes of a training tell each other about a step that is not finite. All of them do the same at the same steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.probe import Together
    from gradwatch.records import Origin

_MOST = 3  # exchanges of a run


class Sharing:
    """The exchanges of findings.

    Nothing in here depends on what only one process knows, so that none waits for another that does not come.
    """

    def __init__(self) -> None:
        self._left = _MOST
        self._explained = False
        self._in_trouble = False

    def is_due(self, together: Together | None) -> bool:
        """Return whether processes exchange something about this step; each of them gets the same answer."""
        return together is not None and not self._explained and self._left > 0

    def agree(self, together: Together, *, ready: bool) -> bool:
        """Return whether all processes are ready to repeat a forward together."""
        return all(one for _, one in together.gather(ready))

    def share(self, together: Together, own: Origin | None) -> Origin | None:
        """Return the finding of this process, else that of the first other one that has one; None if there is none."""
        self._left -= 1
        found = [(rank, one) for rank, one in together.gather(own) if one is not None]
        self._explained = bool(found)
        if own is not None or not found:
            return own
        rank, origin = found[0]
        theirs: Origin = origin.of_rank(rank)
        return theirs

    def trouble(self) -> None:
        """Record that the row of this step is not finite."""
        self._in_trouble = True

    def step_over(self) -> None:
        """Record that a step is over."""
        self._explained = self._explained and self._in_trouble
        self._in_trouble = False
