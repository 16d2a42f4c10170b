"""What a report is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradwatch.records import Alarm, Row, Snapshot


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


class RunLog(Report):
    """A report that keeps the run: it is told of each row too. Its file lies in ``folder``."""

    folder: Path

    def row(self, row: Row) -> None:
        """Take note of a row that was pushed just now and is not judged yet."""
        raise NotImplementedError

    def judged(self, alarms: Sequence[Alarm]) -> None:
        """Take note of alarms that changed state."""
        raise NotImplementedError

    def raised(self, error: BaseException, snapshot: Snapshot) -> None:
        """Keep the moment in which the training raised."""
        raise NotImplementedError

    def went_back(self) -> None:
        """Keep the rows so far apart from those that come: the run goes on from another step."""
        raise NotImplementedError

    def flush(self, timeout: float) -> bool:
        """Wait until what was handed over is written; return False after ``timeout`` seconds."""
        raise NotImplementedError
