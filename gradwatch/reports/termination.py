"""SIGTERM while a picture stands on a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Termination:
    """Does something before SIGTERM ends the process, where nobody else handles it; the process ends by it all the same.

    A program that has a handler of its own, or sets one later, keeps it. As for Ctrl-C, Python comes to it when its main
    thread comes back from the call in which it is.

    Args:
        do: what to do; called in the main thread.
    """

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do
        self._process = os.getpid()
        self._ours: Any = self._handle  # one object: a method is a new one each time it is asked for
        self._set = False

    def watch(self) -> None:
        """Begin, if that can be."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._ours)
            self._set = True

    def forget(self) -> None:
        """Leave the signal as it was."""
        if self._set and signal.getsignal(signal.SIGTERM) is self._ours:
            with contextlib.suppress(ValueError):  # not in the main thread: the handler does nothing more
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._set = False

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() == self._process:  # and not in a copy of it
            with contextlib.suppress(Exception):
                self._do()
        if signal.getsignal(number) is self._ours:  # not called by another handler that has its own way
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
