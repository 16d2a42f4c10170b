"""The report that writes the run log. It copies rows from the history in blocks and does not wait for the disk.

Rows of the fast path are not passed to it one by one. They are copied from the history's ring together, about twice a second or
when there are 64 new ones. If the training makes no further step, the writer thread fetches them itself.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gradwatch.errors import words_of
from gradwatch.reports.base import RunLogReport
from gradwatch.reports.log import write_line
from gradwatch.runlog.batch import Batch
from gradwatch.runlog.flight import record_of
from gradwatch.runlog.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Facts, Row, Snapshot
    from gradwatch.runlog.store import Store

_ROWS = 64
_FLIGHT = 2.0  # seconds that the flight recorder may wait for the disk
_CLOSING = 10.0  # seconds that the end of a run may wait for the disk
_LEAVING = 2.0  # seconds that a log that failed may wait for the disk


def columns_of(history: History) -> list[tuple[str, int, int, int]]:
    """Return the name, number of elements, whether it is a matrix, and fan-in of each layer."""
    numbers = (history.sizes, history.matrices, history.fan_in)
    return list(zip(history.layers, *(values.astype(np.int64).tolist() for values in numbers), strict=True))


class Recording(RunLogReport):
    """One session of a run log.

    Args:
        store: the file, just opened.
        history: history from which the rows are copied.
        tell: called once for each kind of data that could not be written, with a message.
        environment: environment of the run, for the flight recorder.
        batch: returns the statistics of the batch that the user passed; None if there is none.
    """

    period: ClassVar[float] = 0.4

    def __init__(
        self,
        store: Store,
        history: History,
        tell: Callable[[str], None],
        environment: dict[str, Any] | None = None,
        batch: Callable[[], list[dict[str, Any]] | None] = lambda: None,
    ) -> None:
        self.folder = store.folder
        self._environment = environment or {}
        self._batch = batch
        self._flown: set[int] = set()
        self._history = history
        self._writer = Writer(store, tell, resting=self._resting)
        self._most = min(_ROWS, history.window // 2)  # up to 32 rows of the fast path may follow before the next call
        self._taken = self._seen = self._ahead = history.rows
        self._special: list[tuple[int, Row]] = []
        self._alarms: list[Alarm] = []
        self._facts: Facts | None = None
        self._order: NDArray[np.intp] | None = None
        self._layers = len(history.layers)
        self._notes = 0
        self._started = False

    def start(self) -> None:
        """Start the writer thread."""
        self._started = True
        self._writer.start()

    def row(self, row: Row) -> None:
        """Record a row that was just added to the history and is not judged yet."""
        self._special.append((self._history.rows - 1, row))
        if self._history.rows - 1 - self._taken >= self._most:
            self._hand_over(self._history.rows - 1)

    def judged(self, alarms: Sequence[Alarm]) -> None:
        """Record alarms that changed state."""
        self._alarms.extend(alarms)

    def step(self, snapshot: Snapshot) -> None:
        """Pass everything new to the writer thread; nothing further will be done about the last row."""
        critical = [one for one in snapshot.news if one.severity == "critical" and one.opened_step not in self._flown]
        if critical:
            self._flown.update(one.opened_step for one in critical)
            self._fly(snapshot, str(critical[0]))
        else:
            self._hand_over(self._history.rows, snapshot)

    def raised(self, error: BaseException, snapshot: Snapshot) -> None:
        """Call the flight recorder, because the training raised ``error``."""
        self._fly(snapshot, f"training raised {words_of(error)}"[:500], error)

    def _fly(self, snapshot: Snapshot, reason: str, error: BaseException | None = None) -> None:
        """Write the flight recorder's record to the disk, waiting at most 2 seconds, and print where it is."""
        record = record_of(self._history, snapshot.incidents, self._environment, self._batch(), error)
        self._hand_over(self._history.rows, snapshot, [(snapshot.step, reason, record)])
        if self._writer.flush(_FLIGHT):
            with suppress(Exception):  # standard error may be closed, which must not end the log
                write_line(f"gradwatch | step {snapshot.step} | {reason} | kept: gradwatch report {self.folder}")

    def close(self, snapshot: Snapshot) -> None:
        """Write what is left, and close the file."""
        if self._started:
            self._hand_over(self._history.rows, snapshot)
            self._writer.close(_CLOSING)
        else:
            self.abandon()

    def flush(self, timeout: float) -> bool:
        """Wait until everything passed to the writer is written; return False if this takes more than ``timeout`` seconds."""
        return self._writer.flush(timeout)

    def went_back(self) -> None:
        """Begin a new session for the rows that follow, because the run continues from another step."""
        self._hand_over(self._history.rows)
        self._hand_over(self._history.rows, again=True)

    def abandon(self) -> None:
        """Write what there is, add a note that the log ends here, and release thread, file and lock."""
        if self._started:
            with suppress(Exception):  # what failed once may fail again
                self._hand_over(self._history.rows)
            with suppress(Exception):
                nothing = self._batch_of(self._taken, self._taken)
                nothing.notes = [(self._history.row.step, "this log ends here, because gradwatch failed to write it.")]
                self._writer.put(nothing)
        self._writer.close(_LEAVING)

    def _resting(self) -> Batch | None:
        """Return the rows that are only in the history, if the training has made no step since the previous call.

        The writer thread calls this. The same rows are passed to it again later, since what was done about the last one may
        not be known yet.
        """
        rows, taken, special = self._history.rows, self._taken, tuple(self._special)
        rests, self._seen = rows == self._seen, rows
        if not rests or rows in (taken, self._ahead) or len(self._history.layers) != self._layers:
            return None
        self._ahead = rows
        return self._batch_of(max(taken, rows - self._history.window), rows, special)

    def _batch_of(self, first: int, until: int, special: Sequence[tuple[int, Row]] = ()) -> Batch:
        scalars, norms = self._history.copied(first, until)
        with np.errstate(over="ignore"):
            gradient = norms.astype(np.float32)
        return Batch(
            time=time.time(),
            scalars=scalars,
            gradient=gradient,
            special=[(number - first, row) for number, row in special if first <= number < until],
        )

    def _hand_over(
        self,
        until: int,
        snapshot: Snapshot | None = None,
        flights: Sequence[tuple[int, str, str]] = (),
        *,
        again: bool = False,
    ) -> None:
        """Copy the new rows before row ``until``, counted from the beginning of the run, and pass them to the writer thread."""
        history = self._history
        first, self._taken = max(self._taken, history.rows - history.window), until
        batch = self._batch_of(min(first, until), until, self._special)
        batch.alarms, batch.snapshot, batch.flights, batch.again = self._alarms, snapshot, list(flights), again
        self._special = [(number, row) for number, row in self._special if number >= until]
        self._alarms = []
        if snapshot is not None:
            batch.notes = [(snapshot.step, note) for note in snapshot.notes[self._notes :]]
            self._notes = len(snapshot.notes)
        if history.facts is not self._facts:
            self._facts = batch.facts = history.facts
        if self._order is None or not np.array_equal(history.order, self._order):
            self._order = batch.order = history.order
        if len(history.layers) != self._layers:
            self._layers = len(history.layers)
            batch.columns = columns_of(history)
        self._writer.put(batch)
