"""The reports of one run: which of them are due, what becomes of one that raises, and how they end."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gradwatch.shutdown import Failure, all_done

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.records import Alarm, Incident, Row, Snapshot
    from gradwatch.reports.base import Report, RunLogReport
    from gradwatch.reports.notes import Notes


class ReportDesk:
    """Hands snapshots to reports, at once when there is news and otherwise once in each report's period.

    Args:
        reports: told in this order; one that raises is switched off.
        notes: what is new in them is news.
        snapshot: makes a snapshot of this moment with the incidents that are news, the first one at once.

    Attributes: ``log`` is the run log, told of each row as well; None when there is none. ``news`` holds the incidents that
    changed since the last snapshot that was shown.
    """

    def __init__(
        self, reports: Sequence[Report], notes: Notes, snapshot: Callable[[tuple[Incident, ...]], Snapshot]
    ) -> None:
        self.log: RunLogReport | None = None
        self.news: tuple[Incident, ...] = ()
        self._reports = list(reports)
        self._notes = notes
        self._snapshot = snapshot
        self._shown = snapshot(())
        self._shown_at: dict[int, float] = {}
        self._notes_shown = 0

    @property
    def next_due(self) -> float:
        """The time, as `time.perf_counter` gives it, at which a report is due though nothing is new."""
        return min(map(self._due_at, self._reports), default=math.inf)

    def _due_at(self, report: Report) -> float:
        return self._shown_at.get(id(report), -math.inf) + report.period

    def keep(self, log: RunLogReport) -> None:
        """Add a run log, as the last of the reports."""
        self.log = log
        self._reports.append(log)

    def start(self) -> None:
        """Tell the reports that watching begins."""
        for report in tuple(self._reports):
            self._tell(report, "start")

    def row(self, row: Row) -> None:
        """Hand a row to the run log before it is judged."""
        if self.log is not None:
            self._tell(self.log, "row", row)

    def judged(self, alarms: Sequence[Alarm], incidents: Sequence[Incident]) -> None:
        """Take the alarms and the incidents that a row has changed."""
        if alarms and self.log is not None:
            self._tell(self.log, "judged", alarms)
        self.news += tuple(incidents)

    def show(self) -> None:
        """Hand a snapshot to every report that is due."""
        if not self._reports:
            self.news = ()
            return
        now = perf_counter()
        told = bool(self.news) or len(self._notes.all) > self._notes_shown
        due = [report for report in self._reports if told or now >= self._due_at(report)]
        if not due:
            return
        snapshot = self._shown = self._snapshot(self.news)
        self.news, self._notes_shown = (), len(self._notes.all)
        for report in due:
            self._shown_at[id(report)] = now
            self._tell(report, "step", snapshot)

    def raised(self, error: BaseException) -> None:
        """Have the run log keep the moment in which the training raised."""
        if self.log is not None:
            self._tell(self.log, "raised", error, self._snapshot(self.news))

    def went_back(self) -> None:
        """Tell the run log that the coming rows do not follow the last one."""
        if self.log is not None:
            self._tell(self.log, "went_back")

    def flush(self, timeout: float) -> bool:
        """Have the run log write all rows so far; return False if that takes longer, or if there is no log."""
        if self.log is None:
            return False
        self._tell(self.log, "step", self._snapshot(self.news))
        return self.log is not None and self.log.flush(timeout)

    def close(self) -> list[Failure]:
        """Show the reports the last snapshot and end them, each whatever becomes of the others; return what failed."""

        def last() -> None:
            self._shown = self._snapshot(self.news)

        failures = all_done([("the last snapshot", last)])
        snapshot = self._shown
        if failures:
            stale = f"this is the run as it was at step {snapshot.step}: its end could not be put together."
            snapshot = replace(snapshot, notes=(*snapshot.notes, stale))
        for report in tuple(self._reports):
            failed = all_done([(f"report {type(report).__name__}", partial(report.close, snapshot))])
            failures += failed
            if failed:
                all_done([("letting go", report.abandon)])  # that it failed is noted once
        self._reports.clear()
        return failures

    def _tell(self, report: Report, method: str, *arguments: Any) -> None:
        try:
            getattr(report, method)(*arguments)
        except Exception as error:
            self._reports.remove(report)
            if report is self.log:
                self.log = None
            with suppress(Exception):  # that it failed is noted once
                report.abandon()
            self._notes.part_failed(f"report {type(report).__name__}", error)
