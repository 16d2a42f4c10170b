"""The thread that writes a run log: in batches, a few times a second, within bounded memory."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.runlog.batch import Batch
    from gradwatch.runlog.store import Store

_GATHER = 0.2  # seconds to wait for more before a batch is written
_AGAIN = 2.0  # seconds after which a write that failed is tried again
_MOST = 32 * 2**20  # bytes waiting from which on each eighth row keeps its layers; from twice as many on, none is kept


class Writer:
    """Takes batches from the training and writes them to a store.

    Args:
        store: the file; from here on this thread's alone.
        tell: told, once each, of what could not be kept.
    """

    def __init__(self, store: Store, tell: Callable[[str], None], most: int = _MOST) -> None:
        self._store = store
        self._tell = tell
        self._most = most
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
        """Hand over a batch; never waits."""
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
            self._say_once("slow", "the disk is slower than the training: of some rows the run log keeps less.")

    def flush(self, timeout: float) -> bool:
        """Have what was handed over written now; True when it was, within ``timeout`` seconds."""
        with self._wake:
            self._hurry, given = True, self._given
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._written >= given or self._over, timeout) and not self._over

    def close(self, timeout: float) -> None:
        """Write what is left, for at most ``timeout`` seconds, and end."""
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
            self._tell(text)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            with self._wake:
                self._over = True
                self._wake.notify_all()
            self._store.close(ended=self._closing and not self._waiting)

    def _turn(self) -> bool:
        """Wait for something, write it; False at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closing)
            self._wake.wait_for(lambda: self._hurry or self._closing, _GATHER)
            batches, self._hurry = list(self._waiting), False
        if not batches:
            return not self._closing
        if self._store.is_removed():
            self._waiting.clear()
            self._say_once(
                "removed", f"the run log {self._store.folder} was removed: nothing more is kept of this run."
            )
            return False
        try:
            self._store.write(batches)
        except (sqlite3.Error, OSError) as error:
            reason = (
                f"the run log {self._store.folder} cannot be written: {error}. Training goes on; it is tried again."
            )
            self._say_once("disk", reason)
            with self._wake:
                self._wake.wait_for(lambda: self._closing, _AGAIN)
                last, self._closing_tried = self._closing and self._closing_tried, self._closing
            return not last
        with self._wake:
            for batch in batches:
                self._waiting.popleft()
                self._bytes -= batch.nbytes
            self._written += len(batches)
            self._wake.notify_all()
        return True

    _closing_tried = False
