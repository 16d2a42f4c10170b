"""Standard streams of any encoding, which may be closed early by their reader or be missing."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from gradwatch.text.printable import writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console

# Windows raises EINVAL for a closed pipe, Linux raises EIO for a terminal that has been closed
_READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.EINVAL)


class Stream:
    """A text stream that raises neither for characters that it cannot encode nor for a reader that has closed it.

    Characters that the stream's encoding lacks are replaced. After the reader has closed the stream (``... | head``), what is
    written is discarded, and the program runs to its end.

    Args:
        stream: the stream to write to; None: there is none.

    Attributes:
        gone: True if there is no reader any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.gone = stream is None
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return True if the stream is a terminal; False if there is no stream."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write ``text`` and return its length.

        Raises:
            OSError: writing fails for another reason than a closed reader, such as a full disk.
        """
        self._do(lambda stream: stream.write(writable(text, getattr(stream, "encoding", None))))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write a list of lines, without adding line separators."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, unless its reader has closed it."""
        self._do(lambda stream: stream.flush())

    def _do(self, do: Callable[[TextIO], object]) -> None:
        if self.gone or self._stream is None:
            return
        try:
            do(self._stream)
        except OSError as error:
            self.gone = True
            if error.errno not in _READER_IS_GONE:
                raise
        except ValueError:  # it was closed
            self.gone = True


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replace standard output and standard error by a `Stream` each, inside the context."""
    streams = Stream(sys.stdout), Stream(sys.stderr)
    try:
        with redirect_stdout(cast("TextIO", streams[0])), redirect_stderr(cast("TextIO", streams[1])):
            yield
    finally:
        for stream in streams:
            with suppress(OSError):
                stream.flush()
            if stream.gone:
                _close_for_good(stream)


def _close_for_good(stream: Stream) -> None:
    """Discard the buffer of the stream; otherwise the interpreter fails on it when it exits, with another exit code."""
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def console_on(stream: TextIO | None = None) -> Console:
    """Return a rich console that writes to a stream of any encoding; None: the standard output at the time of writing.

    Markup and emoji codes in plain text are not interpreted.
    """
    from rich.console import Console

    if stream is None:
        return Console(markup=False, emoji=False, highlight=False)
    below = getattr(stream, "rich_proxied_file", stream)  # rich looks up the same attribute
    return Console(file=cast("TextIO", Stream(below)), markup=False, emoji=False, highlight=False)
