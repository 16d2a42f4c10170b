"""Work that a thread of its own does in order, so that training does not wait for a server."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Outbox:
    """A queue of work, done in order by one thread, which starts with the first piece. Errors are raised by the next call.

    Args:
        most: number of pieces that may wait; further ones are refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._over = False
        self._error: Exception | None = None

    def put(self, work: Callable[[], object]) -> bool:
        """Have ``work`` done; return False if too much is waiting, in which case it never is."""
        with self._changed:
            self._raise()
            if len(self._waiting) >= self._most:
                return False
            self._waiting.append(work)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="gradwatch-outbox", daemon=True)
                self._thread.start()
            return True

    def close(self) -> None:
        """Wait until all work is done, or one piece has raised, and end the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not (self._waiting or self._busy))
        self.abandon()
        self._raise()

    def abandon(self) -> None:
        """End the thread after the piece that it is at; what waits is never done."""
        with self._changed:
            self._over = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if self._over:
                    return
                work, self._busy = self._waiting.popleft(), True
            try:
                work()
            except Exception as error:
                with self._changed:
                    self._error, self._over = error, True
            with self._changed:
                self._busy = False
                self._changed.notify_all()
