"""Checks that the files of a run log belong to it, made before SQLite opens them, since SQLite may overwrite or remove them."""

from __future__ import annotations

import os
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from gradwatch.errors import RunLogError
from gradwatch.runlog.lock import FILE as LOCK
from gradwatch.runlog.schema import APPLICATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

COMPANIONS = ("-wal", "-shm", "-journal")  # files that SQLite creates next to a database
_SQLITE = b"SQLite format 3\0"
_WAL = (b"\x37\x7f\x06\x82\x00\x2d\xe2\x18", b"\x37\x7f\x06\x83\x00\x2d\xe2\x18")
_JOURNAL = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
_SHARED_MEMORY = (3007000).to_bytes(4, sys.byteorder) + bytes(4)
_HEADER = 136  # bytes: the longest of these headers
_REGION = 32768  # bytes: the size of a shared-memory file with a header is a multiple of this

_users: WeakSet[Any] = WeakSet()  # objects of this process that have the database at their ``path`` open
_looking = threading.RLock()


def files_of(database: Path) -> Iterator[Path]:
    """Yield the paths of all files of a run log: the database itself, SQLite's files next to it, and the lock file."""
    yield database
    yield from (database.with_name(f"{database.name}{suffix}") for suffix in COMPANIONS)
    yield database.with_name(LOCK)


def identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, which identify it under any name; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_open_here(path: Path) -> bool:
    """Return True if a run log that this process reads or writes has this file open.

    Such a file must not be opened again: closing any handle of a file releases all locks that the process holds on it,
    including those of SQLite.
    """
    with _looking:
        databases = [user.path for user in _users]
    found = identity(path)
    return found is not None and any(found == identity(file) for database in databases for file in files_of(database))


def opened_by(user: Any) -> None:
    """Check the files of the database at ``user.path`` (see `check_files`), and register ``user``, which will open it."""
    with _looking:
        check_files(user.path)
        _users.add(user)


def closed_by(user: Any) -> None:
    """Remove ``user`` from the register, because it has closed its database."""
    with _looking:
        _users.discard(user)


def beginning_of(path: Path, size: int = _HEADER) -> bytes:
    """Return the first ``size`` bytes of a file; does not block on a pipe."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(number, size)
    finally:
        os.close(number)


def check_files(database: Path) -> None:
    """Raise a `RunLogError` if a file of a run log is a link, is not a regular file, or belongs to another program.

    No file is changed. A file that this process has open already, and has therefore checked, is not opened again.
    """
    kinds: dict[str, Callable[[bytes, Path, int], bool]] = {
        "": _is_ours,
        "-wal": lambda header, path, _: header[:8] in _WAL or _is_blank(header, path),
        "-shm": _is_shared_memory,
        "-journal": lambda header, path, _: _is_journal(header) or _is_blank(header, path),
    }
    open_here = is_open_here(database)
    for suffix, is_its_own in kinds.items():
        path = database.with_name(f"{database.name}{suffix}")
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise RunLogError(f"{path} is not a regular file, as each file of a run log is. Give another path.")
        if not status.st_size:
            if status.st_nlink > 1:
                raise RunLogError(f"{path} is empty and has another name too, by a hard link. Give another path.")
        elif not open_here:
            header = beginning_of(path)
            if not is_its_own(header, path, status.st_size):
                raise RunLogError(_of_another(path, header, is_database=path == database))


def _is_ours(header: bytes, _path: Path, _size: int) -> bool:
    application = int.from_bytes(header[68:72], "big")
    # if application and tables are still only in the write-ahead log, the first page has no table
    new = application == 0 and header[100:101] == b"\x0d" and header[103:105] == b"\0\0"
    return header[:16] == _SQLITE and (application == APPLICATION or new)


def _is_shared_memory(header: bytes, path: Path, size: int) -> bool:
    """Return True for a shared-memory file: it holds two copies of its header, either of which may still be blank."""
    copies = header[:8], header[48:56]
    blank = bytes(8)
    return _is_blank(header, path) or (size % _REGION == 0 and all(one in (_SHARED_MEMORY, blank) for one in copies))


def _is_journal(header: bytes) -> bool:
    """Return True for a journal: it begins with its magic number, or with zeros and valid sector and page sizes.

    SQLite writes the magic number only after the rest of the journal has reached the disk.
    """
    sector, page = (int.from_bytes(header[place : place + 4], "big") for place in (20, 24))
    sizes = all(512 <= one <= 65536 and one.bit_count() == 1 for one in (sector, page))
    return header[:8] == _JOURNAL or (not any(header[:12]) and sizes)


def _is_blank(header: bytes, path: Path) -> bool:
    """Return True if a file consists of zero bytes only, as after a power failure."""
    if any(header):
        return False
    with path.open("rb") as file:
        return not any(any(part) for part in iter(lambda: file.read(2**16), b""))


def _of_another(path: Path, header: bytes, *, is_database: bool) -> str:
    if not is_database:
        return f"{path} belongs to another program: it begins with {header[:16]!r}. Give another path, or remove it."
    if header[:16] == _SQLITE:
        return f"{path} is an SQLite file of another program, not a run log of gradwatch. Give another path."
    return (
        f"{path} is not a run log: it begins with {header[:16]!r}, unlike an SQLite file. It is damaged, or was written by "
        "another program. Give another path, or remove it."
    )
