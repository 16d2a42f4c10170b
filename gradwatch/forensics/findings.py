"""What was found in the trouble that lasts, and whom it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.forensics.armed import are_several

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.records import Origin


class Findings:
    """Tells each finding, and why nothing was found.

    Args:
        found: called with each finding.
        unknown: called with why an operation was not found.
        note: called with what the user should know.

    Attributes:
        origin: what was found in this step; None if nothing was.
        explained: whether the trouble that lasts is explained already.
    """

    def __init__(
        self, found: Callable[[Origin], None], unknown: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        self._found, self._unknown, self._note = found, unknown, note
        self.origin: Origin | None = None
        self.explained = False
        self._reason = ""  # why the origin of this step is not known here, if other processes may know it

    def tell(self, origin: Origin) -> None:
        """Tell a finding."""
        self.explained = True
        self._reason = ""
        self.origin = origin
        self._found(origin)

    def nothing(self, reason: str) -> None:
        """Tell why nothing was found, or of several processes keep it until all have looked."""
        self._reason = reason
        if not are_several():
            self.tell_reason()

    def tell_reason(self) -> None:
        """Say why nothing was found. Evidence is the same in all processes, so that one of several writes a note."""
        reason, self._reason = self._reason, ""
        if reason:
            (self._note if are_several() else self._unknown)(reason)

    def step_over(self, *, in_trouble: bool) -> None:
        """Begin anew with a step after one that was not in trouble."""
        self.explained = self.explained and in_trouble
        self.tell_reason()

    def forget(self) -> None:
        """Drop what was found in a step that is over."""
        self.origin = None
