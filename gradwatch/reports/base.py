"""The base class of reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gradwatch.records import Alarm, Row, Snapshot


class Report:
    """The base class of reports. A report that raises is switched off, and training goes on.

    `step` is called at the first step, at once when an incident changed or there is a new note, and otherwise when ``period``
    seconds have passed since the last call.

    Attributes:
        period: time in seconds between two calls of `step` if there is no news; infinite by default.
    """

    period: ClassVar[float] = math.inf

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Receive a function that returns the state of the run when it is called. Called before `start`."""

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


class RunLogReport(Report):
    """A report that records the run, and therefore receives every row too.

    Attributes:
        folder: folder of its file.
    """

    folder: Path

    def row(self, row: Row) -> None:
        """Record a row that was just added to the history and is not judged yet."""
        raise NotImplementedError

    def judged(self, alarms: Sequence[Alarm]) -> None:
        """Record alarms that changed state."""
        raise NotImplementedError

    def raised(self, error: BaseException, snapshot: Snapshot) -> None:
        """Record the state of the run at which the training raised ``error``."""
        raise NotImplementedError

    def went_back(self) -> None:
        """Separate the rows so far from those that follow, because the run continues from another step."""
        raise NotImplementedError

    def flush(self, timeout: float) -> bool:
        """Wait until everything so far is written; return False if this takes more than ``timeout`` seconds."""
        raise NotImplementedError
