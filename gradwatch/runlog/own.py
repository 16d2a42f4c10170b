"""Whether the files of a run log are its own, asked before SQLite, which overwrites and removes them unasked, opens them."""

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

COMPANIONS = ("-wal", "-shm", "-journal")  # what SQLite puts beside a database
_SQLITE = b"SQLite format 3\0"
_WAL = (b"\x37\x7f\x06\x82\x00\x2d\xe2\x18", b"\x37\x7f\x06\x83\x00\x2d\xe2\x18")
_JOURNAL = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
_SHARED_MEMORY = (3007000).to_bytes(4, sys.byteorder) + bytes(4)
_HEADER = 136  # bytes: the longest of these headers
_REGION = 32768  # bytes: shared memory is a number of these, when it has a header

_users: WeakSet[Any] = WeakSet()  # what has the database at its ``path`` open in this process, to read or to write
_looking = threading.RLock()


def files_of(database: Path) -> Iterator[Path]:
    """Yield the paths of all files that belong to the run log in ``database``: its own, SQLite's beside it, the lock's."""
    yield database
    yield from (database.with_name(f"{database.name}{suffix}") for suffix in COMPANIONS)
    yield database.with_name(LOCK)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others, whatever it is called; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_open_here(path: Path) -> bool:
    """True when a run log that this process reads or writes has this file open.

    Then it may not be opened another time: to close a file anywhere in a process takes away all locks that the process has on
    it, those of SQLite too.
    """
    with _looking:
        databases = [user.path for user in _users]
    found = identity(path)
    return found is not None and any(found == identity(file) for database in databases for file in files_of(database))


def opened_by(user: Any) -> None:
    """Take note of who will open the database at its ``path``, whose files are its own; see `check_files`."""
    with _looking:
        check_files(user.path)
        _users.add(user)


def closed_by(user: Any) -> None:
    """Take note that it was closed."""
    with _looking:
        _users.discard(user)


def beginning_of(path: Path, size: int = _HEADER) -> bytes:
    """Return the first bytes of a file, without waiting where it is a pipe."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(number, size)
    finally:
        os.close(number)


def check_files(database: Path) -> None:
    """Raise a `RunLogError` where one of a run log's files is a link, no plain file, or another program's.

    Nothing is changed, and nothing is opened that this process has open already and so has found to be a run log.
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
            raise RunLogError(f"{path} is a link or no plain file; a run log's are. Give another path.")
        if not status.st_size:
            if status.st_nlink > 1:
                raise RunLogError(f"{path} is empty and stands elsewhere too, by a hard link. Give another path.")
        elif not open_here:
            header = beginning_of(path)
            if not is_its_own(header, path, status.st_size):
                raise RunLogError(_of_another(path, header, is_database=path == database))


def _is_ours(header: bytes, _path: Path, _size: int) -> bool:
    application = int.from_bytes(header[68:72], "big")
    # its application and tables may still be in the write-ahead log alone: then its first page holds no table
    new = application == 0 and header[100:101] == b"\x0d" and header[103:105] == b"\0\0"
    return header[:16] == _SQLITE and (application == APPLICATION or new)


def _is_shared_memory(header: bytes, path: Path, size: int) -> bool:
    """Its header stands there twice; one or both are blank while it is made."""
    copies = header[:8], header[48:56]
    blank = bytes(8)
    return _is_blank(header, path) or (size % _REGION == 0 and all(one in (_SHARED_MEMORY, blank) for one in copies))


def _is_journal(header: bytes) -> bool:
    """It has its magic number, or will get it when it is on the disk: then sizes of sector and page stand there already."""
    sector, page = (int.from_bytes(header[place : place + 4], "big") for place in (20, 24))
    sizes = all(512 <= one <= 65536 and one.bit_count() == 1 for one in (sector, page))
    return header[:8] == _JOURNAL or (not any(header[:12]) and sizes)


def _is_blank(header: bytes, path: Path) -> bool:
    """True when there is no byte but zero in a file, as after a power failure."""
    if any(header):
        return False
    with path.open("rb") as file:
        return not any(any(part) for part in iter(lambda: file.read(2**16), b""))


def _of_another(path: Path, header: bytes, *, is_database: bool) -> str:
    if not is_database:
        return f"{path} is another program's: it begins with {header[:16]!r}. Give another path, or remove it."
    if header[:16] == _SQLITE:
        return f"{path} is an SQLite file of another program, no run log of gradwatch. Give another path."
    return (
        f"{path} is no run log: it begins with {header[:16]!r} and not as an SQLite file does. It was damaged, or "
        "another program made it. Give another path, or remove it."
    )
