"""The thread that writes a run log in batches, a few times per second, with bounded memory."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from gradwatch.errors import words_of
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.runlog.batch import Batch
    from gradwatch.runlog.store import Store

_GATHER = 0.2  # seconds to wait for further batches before writing
_LOOK = 0.3  # seconds without a batch after which rows are fetched from a resting training
_AGAIN = 2.0  # seconds after which a failed write is tried again
_MOST = 32 * 2**20  # bytes in the queue above which batches are thinned; above twice as many, batches are dropped


class Writer:
    """Writes batches from the training to a store, in a thread of its own.

    Args:
        store: store to write to; only this thread uses it from now on.
        tell: called once for each kind of data that could not be written, with a message.
        most: size of the queue in bytes above which batches are thinned.
        resting: called while no batch arrives; returns the rows that the training has not passed on yet, if it rests.
    """

    def __init__(
        self,
        store: Store,
        tell: Callable[[str], None],
        most: int = _MOST,
        resting: Callable[[], Batch | None] = lambda: None,
    ) -> None:
        self._store = store
        self._tell = tell
        self._most = most
        self._resting = resting
        self._waiting: deque[Batch] = deque()
        self._bytes = 0
        self._given = self._written = 0
        self._thinned = self._lost = 0
        self._hurry = self._closing = self._over = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gradwatch run log", daemon=True)
        self._said: set[str] = set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Add a batch to the queue, without waiting."""
        with self._wake:
            if self._over:
                return
            if self._bytes > self._most:
                self._thinned += len(batch.steps)
                batch.thin()
            if self._bytes > 2 * self._most:
                self._lost += len(batch.steps)
            else:
                self._waiting.append(batch)
                self._bytes += batch.nbytes
                self._given += 1
                self._wake.notify_all()
        if self._thinned or self._lost:
            self._say_once("slow", "the disk is slower than the training, so the run log keeps less of some rows.")

    def flush(self, timeout: float) -> bool:
        """Write all batches in the queue now; return True if they were written within ``timeout`` seconds."""
        with self._wake:
            self._hurry, given = True, self._given
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._written >= given or self._over, timeout) and not self._over

    def close(self, timeout: float) -> None:
        """Write what is left, for at most ``timeout`` seconds, and end the thread."""
        if self._thread.ident is None:  # it was never started
            self._store.close()
            return
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._waiting:
            rows = sum(len(batch.steps) for batch in self._waiting)
            self._say_once(
                "end", f"the run log {self._store.folder} lacks the last {rows} rows: they could not be written."
            )
        if self._lost:
            self._say_once("lost", f"the run log {self._store.folder} lacks {self._lost} rows: the disk was too slow.")

    def _say_once(self, cause: str, text: str) -> None:
        if cause not in self._said:
            self._said.add(cause)
            with suppress(Exception):  # the callback may raise, which must not end the log
                self._tell(text)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            self._say_once("failed", f"the run log {self._store.folder} ends here: {_words(error)}. Training goes on.")
        finally:
            with self._wake:
                self._over = True
                self._wake.notify_all()
            try:
                self._store.close(ended=self._closing and not self._waiting)
            except Exception as error:
                self._say_once("closed", f"the run log {self._store.folder} could not be closed: {_words(error)}.")

    def _turn(self) -> bool:
        """Wait for batches and write them; return False to end the thread."""
        with self._wake:
            there = self._wake.wait_for(lambda: self._waiting or self._closing, _LOOK)
            if there:
                self._wake.wait_for(lambda: self._hurry or self._closing, _GATHER)
            batches, self._hurry = list(self._waiting), False
        if not there:
            self._look()
            return True
        if not batches:
            return not self._closing
        if self._store.is_removed():
            self._waiting.clear()
            self._say_once(
                "removed", f"the run log {self._store.folder} was removed, so the rest of this run is not recorded."
            )
            return False
        settled = self._settle(batches)
        with self._wake:
            for batch in batches[:settled]:
                self._waiting.popleft()
                self._bytes -= batch.nbytes
            self._written += settled
            self._wake.notify_all()
            if settled == len(batches):
                return True
            self._wake.wait_for(lambda: self._closing, _AGAIN)
            last, self._closing_tried = self._closing and self._closing_tried, self._closing
            return not last

    _closing_tried = False

    def _look(self) -> None:
        """Write rows that a resting training has not passed on yet, since it may be killed before its next step."""
        batch = self._resting()
        if batch is not None and not self._store.is_removed():
            with suppress(sqlite3.Error, OSError):  # reported when the rows are passed on
                self._store.write_ahead(batch)

    def _settle(self, batches: Sequence[Batch]) -> int:
        """Write batches; return the number of batches that need not be tried again."""
        try:
            self._store.write(batches)
        except Exception as error:
            if self._is_of_the_disk(error):
                return 0
            for number, batch in enumerate(batches):
                if not self._write_apart(batch):
                    return number
        return len(batches)

    def _write_apart(self, batch: Batch) -> bool:
        """Write a batch that may contain data that cannot be stored, or at least its rows; return False if the disk fails."""
        for part in (batch, *batch.less()):
            error = self._error_of(part)
            if error is None:
                return True
            if self._is_of_the_disk(error):
                return False
            self._say_once(
                "content",
                f"some data of this run cannot be stored in the run log, which continues without it: {_words(error)}.",
            )
        self._lost += len(batch.steps)
        return True

    def _error_of(self, batch: Batch) -> Exception | None:
        try:
            self._store.write([batch])
        except Exception as error:
            return error
        return None

    def _is_of_the_disk(self, error: Exception) -> bool:
        """Return True for an error that may be temporary, and report it; other errors recur with the same batch."""
        passing = isinstance(error, OSError) or type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)
        if passing:
            reason = f"the run log {self._store.folder} cannot be written: {error}."
            self._say_once("disk", f"{reason} Training goes on, and writing is tried again.")
        return passing


def _words(error: Exception) -> str:
    return printable(words_of(error))
