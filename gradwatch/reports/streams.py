"""Access to the standard streams, which a program may have replaced by a tee, a closed file or None."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable


def is_terminal(stream: Any) -> bool:
    """Return True if a stream writes to a terminal, and False if that is unknown."""
    try:
        return bool(stream.isatty())
    except Exception:  # None, closed, or an object with `write` alone
        return False


def same_terminal(one: Any, other: Any) -> bool:
    """Return True if two streams write to the same terminal."""
    if not (is_terminal(one) and is_terminal(other)):
        return False
    try:
        return os.fstat(one.fileno()).st_rdev == os.fstat(other.fileno()).st_rdev
    except Exception:  # an object without a file descriptor
        return one is other


class StreamTap:
    """Intercepts ``write`` and ``flush`` of a stream until it is removed.

    The methods of the stream object are replaced, not the stream in `sys`. Text from a logging handler, a logger or a console
    that obtained the stream earlier is therefore intercepted too.

    Args:
        stream: stream to intercept.
        write: called with the tap and the text instead of ``stream.write``.
        flush: called with the tap before ``stream.flush``.

    Attributes:
        write, flush: the stream's own methods.

    Raises:
        AttributeError: the methods of the stream cannot be replaced.
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
        """Restore the stream. If its methods were replaced again since then, they are left as they are."""
        for name, function in self._ours.items():
            if vars(self.stream).get(name) is not function:
                continue
            if name in self._before:
                setattr(self.stream, name, self._before[name])
            else:
                delattr(self.stream, name)
