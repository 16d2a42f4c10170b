r"""The foot of a terminal: a picture below everything that is written there.

The cursor stays where the program left it, above the picture, so text appears where it would without the picture: from
``print``, from a logger that holds the stream, from a progress bar that returns with ``\r``. Output that bypasses the streams,
such as that of C code and of other processes, is not lost either; several lines of it at once mix with the old picture.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

from gradwatch.errors import words_of
from gradwatch.reports.others import bars_of_tqdm
from gradwatch.reports.streams import StreamTap, same_terminal
from gradwatch.reports.tail import Tail, finished, is_plain
from gradwatch.text.printable import writable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SETTLING = 0.1  # longest time, in seconds, that a prompt waits for a picture to be drawn


class _Shared(StreamTap):
    """A stream of the picture's terminal.

    Attributes: ``rest`` and ``partial`` are what of its text is not shown yet; ``idle`` is True when nothing was written since
    the last flush.
    """

    rest = partial = ""
    idle = True


class Foot:
    """Draws a picture at the foot of the terminal that ``stream`` writes to, until `end` is called.

    Args:
        stream: stream to draw on.
        size: function that returns the columns and rows of the terminal.

    Attributes:
        over: True if nothing is drawn any more.
        reason: why drawing stopped, if not by `end`.
        settled: event that is clear while a picture is about to be drawn.
        awaited: True while a prompt waits for the picture.
    """

    def __init__(self, stream: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        self.stream: Any = stream
        self._write, self._flush = stream.write, stream.flush
        self._size = size
        self._lock = threading.RLock()
        self._tail = Tail()
        self._picture: Sequence[str] = ()
        self._drawn = 0
        self._drawn_size: tuple[int, int] | None = None
        self._taps: list[_Shared] = []
        self._process = os.getpid()
        self.over = False
        self.reason = ""
        self.awaited = False
        self.settled = threading.Event()
        self.settled.set()

    def share(self) -> None:
        """Intercept what is written to this terminal from now on.

        Raises:
            AttributeError: the methods of a stream cannot be replaced.
        """
        try:
            for stream in (self.stream, sys.stdout, sys.stderr):
                if same_terminal(stream, self.stream) and all(tap.stream is not stream for tap in self._taps):
                    self._taps.append(_Shared(stream, self._written, self._flushed))
        except BaseException:
            self.leave()
            raise

    def draws_on(self, stream: Any) -> bool:
        """Return True if this picture is drawn on the terminal of ``stream``."""
        return not self.over and os.getpid() == self._process and same_terminal(stream, self.stream)

    def draw(self, picture: Sequence[str]) -> None:
        """Draw the rows of ``picture`` in place of the last picture."""
        with self._lock:
            self._picture = picture
            self.redraw()

    def redraw(self) -> None:
        """Draw the last picture again, below what has been written past the streams meanwhile."""
        with self._lock:
            if not self.over:
                self._emit(self._drawing())
        self.settled.set()

    @property
    def resized(self) -> bool:
        """True if the size of the terminal has changed since the last picture."""
        return self._drawn_size is not None and self._size() != self._drawn_size

    def room(self) -> int:
        """Return the largest number of rows that a picture may have."""
        return max(0, self._size()[1] - 1 - self._tail.below)

    def give_way(self, reason: str) -> None:
        """Remove the picture and stop drawing, for ``reason``."""
        with self._lock:
            if not self.over:
                self._clear(self._clearing(self._tail.below + 1))
                self.leave(reason)

    def end(self, text: str = "") -> None:
        """Remove the picture, write ``text`` in its place and stop drawing."""
        if os.getpid() != self._process:  # a copy in a forked child, where the lock may be held forever
            self.leave()
            return
        with self._lock:
            if self.over:
                return
            self._clear(self._clearing(self._tail.below + 1))
            for tap in self._taps:
                self._emit(tap.rest + (tap.partial and "\r\n" * (not self._tail.blank) + tap.partial + "\r\n"))
            below = self._tail.below
            self._emit("\r\n" * (below + (not self._tail.blank or below > 0)) + "\r" + text)
            self.leave()

    def say(self, text: str) -> None:
        """Write whole lines above the picture, on rows of their own."""
        if not text or os.getpid() != self._process:
            return
        with self._lock:
            if not self.over:
                tap = next(tap for tap in self._taps if tap.stream is self.stream)
                begun = not self._tail.blank and not bars_of_tqdm()
                self._written(tap, "\n" * begun + text)

    def leave(self, reason: str = "") -> None:
        """Stop drawing and restore the streams."""
        self.over, self.reason = True, self.reason or reason
        self.settled.set()
        for tap in self._taps:
            tap.remove()

    # What the program writes.

    def _written(self, tap: _Shared, text: str) -> int:
        if self.over or os.getpid() != self._process or not isinstance(text, str):
            return tap.write(text)
        with self._lock:
            tap.idle = False
            if tap.partial or self._lands_on_a_bar(text):
                if is_plain(text):
                    return self._write_above(tap, text)
                self._write_through(tap, tap.partial)
                tap.partial = ""
            whole, tap.rest = finished(tap.rest + text)
            self._write_through(tap, whole)
            return len(text)

    def _write_through(self, tap: _Shared, text: str) -> None:
        first, newline, rest = text.partition("\n")
        before, gap = self._clearing(self._tail.below + 1), self._tail.below
        at_end = self._drawn > 0 and self._tail.at_end(self._size()[0])
        self._tail.feed(first, self._size()[0])
        if self._tail.moved or self._tail.another:  # it wraps or moves up
            self._clear(before)
            self._write_moving(tap, first, newline + rest)
            return
        # the row is not redrawn: text of others on it stays, and what is to the right belonged to the picture
        if at_end:
            self._emit("\x1b[K")
        tap.write(first + newline)
        _quietly(tap.flush)
        if newline:
            self._tail.feed(newline, self._size()[0])
            if rest:
                self._clear(self._clearing(gap))
            self._write_moving(tap, "", rest)

    def _write_moving(self, tap: _Shared, fed: str, rest: str) -> None:
        """Write text that moves to other rows, and draw the picture below it; ``fed`` has been fed to the tail already."""
        self._tail.feed(rest, self._size()[0])
        try:
            if fed or rest:
                tap.write(fed + rest)
        finally:
            _quietly(tap.flush)
            if self._tail.another:
                self.leave("another live display is running")
            else:
                self._emit(self._drawing())

    def _lands_on_a_bar(self, text: str) -> bool:
        return bool(text.strip("\n")) and not self._tail.blank and is_plain(text) and bars_of_tqdm()

    def _write_above(self, tap: _Shared, text: str) -> int:
        """Write whole lines above a bar, which is drawn again below them."""
        lines, newline, tap.partial = (tap.partial + text).rpartition("\n")
        if newline:
            bars = self._tail.rows()
            below = len(bars) - 1
            self._clear(self._clearing(below + 1) + "\r\x1b[2K" + "\r\n\x1b[2K" * below + _up(below) + "\r")
            try:
                tap.write(lines + newline)
            finally:
                _quietly(tap.flush)
                self._emit("\r\n".join(bars) + _up(below) + self._tail.place() + self._drawing())
        return len(text)

    def _flushed(self, tap: _Shared) -> None:
        """Wait for a pending picture if nothing was written, as when `input` flushes before a prompt that is not intercepted."""
        if tap.idle and not self.over and os.getpid() == self._process:
            self.awaited = True
            self.settled.wait(_SETTLING)
            self.awaited = False
        tap.idle = True

    # What is drawn.

    def _drawing(self) -> str:
        size = self._size()
        below = self._tail.below
        rows = list(self._picture[: max(0, size[1] - 1 - below)])
        if not rows:
            clearing, self._drawn = self._clearing(below + 1), 0
            return clearing
        changed, self._drawn_size = self._drawn_size not in (None, size), size
        erased = max(0, self._drawn - len(rows))
        self._drawn = len(rows)
        # wrapping is off, because a row may be too long for a terminal that has just become narrower
        return (
            "\x1b[?7l\x1b[0m\x1b[K" + "\r\n" * (below + 1) + ("\x1b[J" if changed else "")
            + "\r\n".join(f"\x1b[2K{row}\x1b[0m" for row in rows) + "\r\n\x1b[2K" * erased
            + _up(below + len(rows) + erased) + "\x1b[?7h" + self._tail.place()
        )  # fmt: skip

    def _clearing(self, gap: int) -> str:
        """Return text that erases the picture, whose first row is ``gap`` rows below the cursor."""
        if not self._drawn:
            return ""
        return (
            "\x1b[0m\x1b[K" + "\r\n" * gap + "\x1b[J\x1b[2K" + "\r\n\x1b[2K" * (self._drawn - 1)
            + _up(gap + self._drawn - 1) + self._tail.place()
        )  # fmt: skip

    def _clear(self, clearing: str) -> None:
        self._drawn = 0
        self._emit(clearing)

    def _emit(self, text: str) -> None:
        """Write to the terminal, and stop drawing if that fails."""
        if not text:
            return
        try:
            self._write(writable(text, getattr(self.stream, "encoding", None)))
            self._flush()
        except Exception as error:
            self.leave(f"the terminal cannot be written to ({words_of(error)})")


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows else ""


def _quietly(do: Callable[[], object]) -> None:
    try:
        do()
    except Exception:
        return  # the program did not request this flush
