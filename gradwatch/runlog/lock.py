"""One writer for a run log: a lock that ends with its process, however that ends, and says who holds it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import IO, TYPE_CHECKING

from gradwatch.errors import RunLogError

if TYPE_CHECKING:
    from pathlib import Path

FILE = "writer.lock"
_PATIENCE = 0.3  # seconds: a reader that asks who writes holds the lock for a moment

# a process may lock a file twice, and loses the lock when it closes the file anywhere: so its own are known here
_mine: set[Path] = set()


class WriterLock:
    """Held from the beginning to `release`.

    Args:
        folder: the run log's folder; it exists.

    Raises:
        RunLogError: another process, or another monitor of this one, writes to this run log.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = (folder / FILE).resolve()
        self._file: IO[str] | None = None
        if self._path in _mine:
            raise RunLogError(
                f"The run log {folder} is being written by another monitor of this process. Give each model its own path."
            )
        file = self._path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + _PATIENCE
        while not _lock(file, exclusive=True):
            if time.monotonic() > deadline:
                who = _who(file)
                file.close()
                raise RunLogError(
                    f"The run log {folder} is being written by {who}. Two processes cannot write one log: "
                    "end the other one, or give this run its own path."
                )
            time.sleep(0.01)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        self._file = file
        _mine.add(self._path)

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._file is not None:
            _mine.discard(self._path)
            self._file.close()
            self._file = None


def is_written(folder: Path) -> bool:
    """True while a process writes to this run log; False where that cannot be told."""
    path = (folder / FILE).resolve()
    if path in _mine:
        return True
    try:
        with path.open(encoding="utf-8") as file:
            return not _lock(file, exclusive=False)
    except OSError:
        return False


def _who(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read(1000))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str], *, exclusive: bool) -> bool:  # noqa: ARG001  there is one kind
        file.seek(4096)  # what is locked cannot be read there: not the beginning, which says who
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import errno
    import fcntl

    def _lock(file: IO[str], *, exclusive: bool) -> bool:
        """Take the lock; False when another process holds it. Unlike `flock`, forked children do not keep it."""
        try:
            fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            # a file system without locks: then nobody can be told from another, and two writers are the user's to avoid
            return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        return True
