"""One writer for a run log: a lock that ends with its process, however that ends, and says who holds it."""

from __future__ import annotations

import gc
import json
import os
import socket
import stat
import sys
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from gradwatch.errors import RunLogError
from gradwatch.printable import printable

if TYPE_CHECKING:
    from pathlib import Path

FILE = "writer.lock"
_PATIENCE = 0.3  # seconds: a reader that asks who writes holds the lock for a moment
_MOST = 1000  # bytes; a lock's file is smaller
_TRIES = 100  # times to open a file that others make and remove

# a process may lock a file twice, and loses the lock when it closes the file anywhere: so its own are known here
_mine: set[Path] = set()


class WriterLock:
    """Held from the beginning to `release` or `undo`.

    Args:
        folder: the run log's folder; it exists.

    Raises:
        RunLogError: another process, or another monitor of this one, writes to this run log; or the lock's file is a link, or
            another program's. It was not changed then.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / FILE
        self._file: IO[bytes] | None = None
        if self._path in _mine:
            gc.collect()  # the model of a cell that is run again may wait for the collector, and its monitor with it
        if self._path in _mine:
            raise RunLogError(
                f"The run log {folder} is being written by another monitor of this process. Give each model its own path."
            )
        self._before: tuple[bytes, tuple[int, int]] | None = None
        while self._file is None:
            file, before = self._open()
            try:
                self._take(file, folder)
                if _is_at(file, self._path):  # else a process that was refused has removed it meanwhile
                    if before is not None:
                        file.seek(0)
                        self._before = file.read(_MOST), (before.st_atime_ns, before.st_mtime_ns)
                    self._file = file
            finally:
                if self._file is None:
                    file.close()
        _mine.add(self._path)
        try:
            self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BaseException:
            self.undo()
            raise

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(content)

    def _open(self) -> tuple[IO[bytes], os.stat_result | None]:
        """Open the lock's file; return also what it was like before, None where it was made."""
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                return _opened(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL), None
            with suppress(FileNotFoundError):  # removed meanwhile
                file = _opened(self._path, os.O_RDWR)
                return file, os.fstat(file.fileno())
        raise OSError(f"{self._path} comes and goes")

    def _take(self, file: IO[bytes], folder: Path) -> None:
        status = os.fstat(file.fileno())
        if (status.st_size == 0 and status.st_nlink > 1) or (status.st_size and _holder(file) is None):
            raise RunLogError(
                f"{self._path} is a file of another program, not the lock of a run log. Give another path, or remove it."
            )
        deadline = time.monotonic() + _PATIENCE
        while not _lock(file, exclusive=True):
            if time.monotonic() > deadline:
                raise RunLogError(
                    f"The run log {folder} is being written by {_who(file)}. Two processes cannot write one log: "
                    "end the other one, or give this run its own path."
                )
            time.sleep(0.01)

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._file is not None:
            _mine.discard(self._path)
            self._file.close()
            self._file = None

    def undo(self) -> None:
        """Let go, with the file as it was found, or removed where there was none; safe to call twice."""
        if self._file is not None:
            with suppress(OSError):
                if self._before is not None:
                    content, times = self._before
                    self._write(content)
                    os.utime(self._path, ns=times)
                elif sys.platform != "win32":  # there, what is open cannot be removed
                    self._path.unlink()
            self.release()
            if self._before is None and sys.platform == "win32":
                with suppress(OSError):
                    self._path.unlink()


def is_written(folder: Path) -> bool:
    """True while a process writes to this run log; False where that cannot be told."""
    try:
        path = folder.resolve() / FILE
        if path in _mine:
            return True
        with _opened(path, os.O_RDONLY) as file:
            return not _lock(file, exclusive=False)
    except (OSError, RuntimeError, RunLogError):  # RuntimeError: links that lead in a circle
        return False


def _opened(path: Path, how: int) -> IO[bytes]:
    """Open a plain file, and neither a link nor a pipe, which would be waited for."""
    for one in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not each system has them
        how |= getattr(os, one, 0)
    try:
        number = os.open(path, how, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RunLogError(f"{path} is no plain file, as the lock of a run log is. Give another path.") from error
        raise
    file = os.fdopen(number, "rb" if how & os.O_ACCMODE == os.O_RDONLY else "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(number).st_mode) or path.is_symlink():
        file.close()
        raise RunLogError(f"{path} is no plain file, as the lock of a run log is. Give another path.")
    return file


def _is_at(file: IO[bytes], path: Path) -> bool:
    """True when an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


def _holder(file: IO[bytes]) -> dict[str, Any] | None:
    """Return what a lock's file says of its holder; None where it is no lock's file."""
    file.seek(0)
    try:
        text = file.read(_MOST)
        told = json.loads(text) if not file.read(1) else None
    except (ValueError, RecursionError, OSError):
        return None
    ours = isinstance(told, dict) and told.keys() == {"pid", "host"} and isinstance(told["pid"], int)
    return told if ours else None


def _who(file: IO[bytes]) -> str:
    holder = _holder(file)
    return "another process" if holder is None else printable(f"process {holder['pid']} on {holder['host']}")


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes], *, exclusive: bool) -> bool:  # noqa: ARG001  there is one kind
        file.seek(4096)  # what is locked cannot be read there: not the beginning, which says who
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import errno
    import fcntl

    def _lock(file: IO[bytes], *, exclusive: bool) -> bool:
        """Take the lock; False when another process holds it. Unlike `flock`, forked children do not keep it."""
        try:
            fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            # a file system without locks: then nobody can be told from another, and two writers are the user's to avoid
            return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        return True
