"""The standard streams, whatever a program has made of them: a tee, a closed file, None."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable


def is_terminal(stream: Any) -> bool:
    """True when a stream writes to a terminal; one that cannot tell does not."""
    try:
        return bool(stream.isatty())
    except Exception:  # None, closed, or an object with `write` alone
        return False


def same_terminal(one: Any, other: Any) -> bool:
    """True when two streams write to one terminal."""
    if not (is_terminal(one) and is_terminal(other)):
        return False
    try:
        return os.fstat(one.fileno()).st_rdev == os.fstat(other.fileno()).st_rdev
    except Exception:  # no descriptor: a stand-in for a terminal
        return one is other


class StreamTap:
    """Stands before ``write`` and ``flush`` of a stream until it is removed.

    It sits on the object and not in its place in `sys`: a logging handler, a logger or a console that took hold of the
    stream long before writes through it all the same.

    Args:
        stream: the stream.
        write: called with the tap and the text in place of ``stream.write``.
        flush: called with the tap before ``stream.flush``.

    Attributes: ``write`` and ``flush`` are the stream's own.

    Raises:
        AttributeError: the stream does not bear it.
    """

    def __init__(self, stream: TextIO, write: Callable[[Any, str], int], flush: Callable[[Any], None]) -> None:
        self.stream: Any = stream
        self.write, self.flush = stream.write, stream.flush
        before = dict(vars(stream))

        def tapped_write(text: str) -> int:
            return write(self, text)

        def tapped_flush() -> None:
            flush(self)
            self.flush()

        self._ours = {"write": tapped_write, "flush": tapped_flush}
        self._before = {name: before[name] for name in self._ours if name in before}
        for name, function in self._ours.items():
            setattr(stream, name, function)

    def remove(self) -> None:
        """Leave the stream as it was; where another tap has come on top, this one passes everything on."""
        for name, function in self._ours.items():
            if vars(self.stream).get(name) is not function:
                continue
            if name in self._before:
                setattr(self.stream, name, self._before[name])
            else:
                delattr(self.stream, name)
