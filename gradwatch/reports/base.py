"""The base class of reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from gradwatch.records import Snapshot


class Report:
    """The base class of reports. A report that raises is switched off, and training goes on.

    `step` is called at the first step, at once when an incident changed or there is a new note, and otherwise when ``period``
    seconds have passed since the last call.

    Class variables:
        period: time in seconds between two calls of `step` if there is no news; infinite by default.
    """

    period: ClassVar[float] = math.inf

    def start(self) -> None:
        """Prepare for a run. Called when the monitor is attached, before the first step."""

    def step(self, snapshot: Snapshot) -> None:
        """Report the current step; ``snapshot.news`` holds the incidents that changed since the last call."""
        raise NotImplementedError

    def close(self, snapshot: Snapshot) -> None:
        """Report the whole run. Nothing follows, unless it raises."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Release threads, files and streams. Called after the report raised; nothing follows."""
