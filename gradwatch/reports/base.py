"""The base class of reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gradwatch.records import Alarm, Row, Scalars, Snapshot


class RowSource(Protocol):
    """The rows of a run."""

    rows: int

    def scalars(self, first: int, until: int) -> Scalars:
        """Return copies of the scalars of the rows with numbers in ``range(first, until)``."""


class Report:
    """The base class of reports. A report that raises is switched off, and training goes on.

    `step` is called at the first step, at once when an incident changed or there is a new note, and otherwise when ``period``
    seconds have passed since the last call.

    Attributes:
        takes_rows: whether it receives the numbers of every row too, through `rows`.
        period: time in seconds between two calls of `step` if there is no news; infinite by default.
        shows_notes: whether it shows each new note at once, where a person looks.
    """

    takes_rows: ClassVar[bool] = False
    period: ClassVar[float] = math.inf
    shows_notes: ClassVar[bool] = False

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Receive a function that returns the state of the run when it is called. Called before `start`."""

    def start(self) -> None:
        """Prepare for a run. Called when the monitor is attached, before the first step."""

    def rows(self, rows: Scalars) -> None:
        """Report the rows since the last call, at most 64. Called before `step` and `close`, if it ``takes_rows``."""
        raise NotImplementedError

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
