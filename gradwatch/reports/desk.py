"""The reports of one run: calls those that are due, switches off those that raise, and closes them."""

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

    from gradwatch.records import Alarm, Incident, Row, Scalars, Snapshot
    from gradwatch.reports.base import Report, RowSource, RunLogReport
    from gradwatch.reports.notes import Notes

_ROWS = 32  # after which rows are passed on: up to 31 of the fast path may follow, and the history keeps at least 64


class ReportDesk:
    """Passes snapshots to reports, immediately if there is news, and otherwise once per period of each report.

    Args:
        reports: reports in the order in which they are called; one that raises is switched off.
        notes: notes of the run; a new note is news.
        snapshot: returns a snapshot of the run, given the incidents that changed; it is called once on creation.
        history: rows of the run.

    Attributes:
        log: the run log, which receives every row as well; None: there is none.
        news: incidents that changed since the last snapshot that was shown.
    """

    def __init__(
        self,
        reports: Sequence[Report],
        notes: Notes,
        snapshot: Callable[[tuple[Incident, ...]], Snapshot],
        history: RowSource,
    ) -> None:
        self.log: RunLogReport | None = None
        self.news: tuple[Incident, ...] = ()
        self._reports = list(reports)
        self._notes = notes
        self._snapshot = snapshot
        self._shown = snapshot(())
        self._history = history
        self._passed = history.rows  # rows that reports have received
        self._shown_at: dict[int, float] = {}
        self._notes_shown = 0
        self._look_who_shows_notes()

    @property
    def next_due(self) -> float:
        """The time, as returned by `time.perf_counter`, at which the next report is due without news."""
        return min(map(self._due_at, self._reports), default=math.inf)

    def _due_at(self, report: Report) -> float:
        return self._shown_at.get(id(report), -math.inf) + report.period

    def keep(self, log: RunLogReport) -> None:
        """Add a run log, as the last of the reports."""
        self.log = log
        self._reports.append(log)

    def start(self) -> None:
        """Call `Report.connect` and `Report.start` of all reports."""
        for report in tuple(self._reports):
            self._tell(report, "connect", partial(self._snapshot, ()))
            self._tell(report, "start")

    def row(self, row: Row) -> None:
        """Pass a row to the run log before it is judged."""
        if self.log is not None:
            self._tell(self.log, "row", row)

    def judged(self, alarms: Sequence[Alarm], incidents: Sequence[Incident]) -> None:
        """Pass the alarms that a row has changed to the run log, and add its incidents to the news."""
        if alarms and self.log is not None:
            self._tell(self.log, "judged", alarms)
        self.news += tuple(incidents)

    def show(self) -> None:
        """Pass a snapshot to every report that is due."""
        if not self._reports:
            self.news = ()
            return
        if self._history.rows - self._passed >= _ROWS:
            self._pass_rows()
        now = perf_counter()
        told = bool(self.news) or len(self._notes.all) > self._notes_shown
        due = [report for report in self._reports if told or now >= self._due_at(report)]
        if not due:
            return
        snapshot = self._shown = self._snapshot(self.news)
        self.news, self._notes_shown = (), len(self._notes.all)
        self._pass_rows()
        for report in [report for report in due if report in self._reports]:
            self._shown_at[id(report)] = now
            self._tell(report, "step", snapshot)

    def _new_rows(self) -> Scalars | None:
        """Return the rows that reports have not received yet; None if there are none, or no report takes any."""
        first, self._passed = self._passed, self._history.rows
        if first == self._passed or not any(report.takes_rows for report in self._reports):
            return None
        return self._history.scalars(first, self._passed)

    def _pass_rows(self) -> None:
        rows = self._new_rows()
        for report in tuple(self._reports):
            if rows is not None and report.takes_rows:
                self._tell(report, "rows", rows)

    def raised(self, error: BaseException) -> None:
        """Let the run log record the state at which the training raised ``error``."""
        if self.log is not None:
            self._tell(self.log, "raised", error, self._snapshot(self.news))

    def went_back(self) -> None:
        """Notify the run log that the next rows do not follow the last one."""
        if self.log is not None:
            self._tell(self.log, "went_back")

    def flush(self, timeout: float) -> bool:
        """Let the run log write all rows so far; return False if this exceeds ``timeout`` seconds or there is no log."""
        if self.log is None:
            return False
        self._tell(self.log, "step", self._snapshot(self.news))
        return self.log is not None and self.log.flush(timeout)

    def close(self) -> list[Failure]:
        """Pass the last rows and the last snapshot to all reports and close them, even if some raise; return what failed."""
        rows: Scalars | None = None
        self._notes.be_shown(shown=False)  # no report shows what the run log has to say when it is closed

        def last() -> None:
            self._shown = self._snapshot(self.news)

        def last_rows() -> None:
            nonlocal rows
            rows = self._new_rows()

        def end(report: Report) -> None:
            if rows is not None and report.takes_rows:
                report.rows(rows)
            report.close(snapshot)

        failures = all_done([("the last snapshot", last), ("the last rows", last_rows)])
        snapshot = self._shown
        if failures:
            stale = f"this is the state at step {snapshot.step}, because the last snapshot could not be made."
            snapshot = replace(snapshot, notes=(*snapshot.notes, stale))
        for report in tuple(self._reports):
            failed = all_done([(f"report {type(report).__name__}", partial(end, report))])
            failures += failed
            if failed:
                all_done([("releasing", report.abandon)])  # the failure of the report is noted already
        self._reports.clear()
        return failures

    def _look_who_shows_notes(self) -> None:
        self._notes.be_shown(shown=any(report.shows_notes for report in self._reports))

    def _tell(self, report: Report, method: str, *arguments: Any) -> None:
        try:
            getattr(report, method)(*arguments)
        except Exception as error:
            self._reports.remove(report)
            if report is self.log:
                self.log = None
            with suppress(Exception):  # the failure of the report is noted below
                report.abandon()
            self._look_who_shows_notes()
            self._notes.part_failed(f"report {type(report).__name__}", error)
