"""What a report is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from gradwatch.records import Snapshot


class Report:
    """Tells of a run. A report that raises is switched off; training goes on.

    `step` is called when an incident changed (then ``snapshot.news`` holds it), and otherwise every ``period`` seconds
    at most.
    """

    period: ClassVar[float] = math.inf

    def start(self) -> None:
        """Make ready: the monitor is attached, no step has been made yet."""

    def step(self, snapshot: Snapshot) -> None:
        """Tell of this moment."""
        raise NotImplementedError

    def close(self, snapshot: Snapshot) -> None:
        """Tell of the whole run; nothing follows."""
        raise NotImplementedError

    def abandon(self) -> None:
        """It raised and is told nothing more: let go of threads, files and streams."""
