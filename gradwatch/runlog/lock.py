"""The lock of the process that writes a run log. It names its holder, and is released even if the process is killed."""

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
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from pathlib import Path

FILE = "writer.lock"
_PATIENCE = 0.3  # seconds to wait for the lock, since a reader holds it briefly to check whether a process writes
_MOST = 1000  # bytes; a lock file is smaller
_TRIES = 100  # attempts to open a file that other processes create and remove

# a process can lock a file twice, and loses the lock when it closes any handle of the file: its own locks are kept here
_mine: set[Path] = set()


class WriterLock:
    """The lock of one writer, which is held until `release` or `undo`.

    Args:
        folder: existing folder of the run log.

    Raises:
        RunLogError: another process, or another monitor of this process, writes to this run log; or the lock file is a link or
            belongs to another program. The file is unchanged then.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / FILE
        self._file: IO[bytes] | None = None
        if self._path in _mine:
            gc.collect()  # if a notebook cell is run again, its old model and monitor may still wait for the garbage collector
        if self._path in _mine:
            raise RunLogError(
                f"The run log {folder} is being written by another monitor of this process. Give each model its own path."
            )
        self._before: tuple[bytes, tuple[int, int]] | None = None
        while self._file is None:
            file, before = self._open()
            try:
                self._take(file, folder)
                if _is_at(file, self._path):  # otherwise a process that was refused has removed it meanwhile
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
        """Open the lock file; return it with its status from before, or None if it was created."""
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                return _opened(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL), None
            with suppress(FileNotFoundError):  # removed meanwhile
                file = _opened(self._path, os.O_RDWR)
                return file, os.fstat(file.fileno())
        raise OSError(f"{self._path} could not be opened, because other processes keep creating and removing it")

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
        """Release the lock. Has no effect if it is released already."""
        if self._file is not None:
            _mine.discard(self._path)
            self._file.close()
            self._file = None

    def undo(self) -> None:
        """Release the lock and restore the file as it was found, or remove it if there was none. Can be called twice."""
        if self._file is not None:
            with suppress(OSError):
                if self._before is not None:
                    content, times = self._before
                    self._write(content)
                    os.utime(self._path, ns=times)
                elif sys.platform != "win32":  # Windows cannot remove an open file
                    self._path.unlink()
            self.release()
            if self._before is None and sys.platform == "win32":
                with suppress(OSError):
                    self._path.unlink()


def is_written(folder: Path) -> bool:
    """Return True if a process writes to this run log; False also if this cannot be determined."""
    try:
        path = folder.resolve() / FILE
        if path in _mine:
            return True
        with _opened(path, os.O_RDONLY) as file:
            return not _lock(file, exclusive=False)
    except (OSError, RuntimeError, RunLogError):  # RuntimeError: a loop of links
        return False


def _opened(path: Path, how: int) -> IO[bytes]:
    """Open a regular file; raise a `RunLogError` for a link, or for a pipe, which would block."""
    for one in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not available on every system
        how |= getattr(os, one, 0)
    try:
        number = os.open(path, how, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RunLogError(
                f"{path} is not a regular file, as the lock of a run log is. Give another path."
            ) from error
        raise
    file = os.fdopen(number, "rb" if how & os.O_ACCMODE == os.O_RDONLY else "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(number).st_mode) or path.is_symlink():
        file.close()
        raise RunLogError(f"{path} is not a regular file, as the lock of a run log is. Give another path.")
    return file


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return True if an open file is the file at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


def _holder(file: IO[bytes]) -> dict[str, Any] | None:
    """Return the process that a lock file names as its holder; None if it is not a lock file."""
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
        file.seek(
            4096
        )  # Windows blocks reading of a locked range, so the beginning, which names the holder, is not locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import errno
    import fcntl

    def _lock(file: IO[bytes], *, exclusive: bool) -> bool:
        """Take the lock; return False if another process holds it. Unlike with `flock`, forked children do not keep it."""
        try:
            fcntl.lockf(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            # on a file system without locks, writers cannot be distinguished, and the user must avoid a second writer
            return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
        return True
