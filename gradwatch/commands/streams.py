"""Streams of text as they are in the world: of any encoding, closed early by their reader, or not there at all."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from gradwatch.printable import writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console

# EINVAL is what Windows says of a closed pipe, EIO what Linux says of a terminal that is gone
_READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.EINVAL)


class Stream:
    """Stands in for a stream of text, and never fails because of what is written or who reads.

    What the stream's encoding cannot take is written as something it can. When the reader is gone (``... | head``), nothing
    more is written, and who writes goes on to its end.

    Args:
        stream: the stream; None: there is none.

    Attributes: ``gone`` is True when nobody reads any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.gone = stream is None
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """See `io.IOBase`; False where there is no stream."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """See `io.TextIOBase`; raises an `OSError` where the disk is full, and none where the reader is gone."""
        self._do(lambda stream: stream.write(writable(text, getattr(stream, "encoding", None))))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """See `io.IOBase`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """See `io.IOBase`."""
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
    """Let a program of gradwatch's own write to its standard streams as a `Stream`."""
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
    """Lead what is left in the stream's buffer nowhere; else the interpreter fails on it at its end, with another exit code."""
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def console_on(stream: TextIO | None = None) -> Console:
    """Return a console of rich that draws on a stream of any encoding; None is standard output, whatever that is then.

    Plain text stays plain: neither markup nor emoji codes are looked for in it.
    """
    from rich.console import Console

    if stream is None:
        return Console(markup=False, emoji=False, highlight=False)
    below = getattr(stream, "rich_proxied_file", stream)  # rich looks for it too
    return Console(file=cast("TextIO", Stream(below)), markup=False, emoji=False, highlight=False)
