"""Whether the files that a run log is written to are its own, asked before the first byte is written."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from gradwatch.errors import RunLogError
from gradwatch.runlog.schema import APPLICATION, FILE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# those that read a run log in this process: a file of theirs may not be opened here, for to close it would take away the
# locks that SQLite holds on it; they have found that it is a run log
readers: WeakSet[Any] = WeakSet()
_SQLITE = b"SQLite format 3\0"
_WAL = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
_JOURNAL = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
_SHARED_MEMORY = (3007000).to_bytes(4, sys.byteorder)
_HEADER = 100  # bytes


def check_files(folder: Path) -> None:
    """Raise a `RunLogError` where one of a run log's files is a link, no plain file, or another program's.

    Nothing is changed. The files beside ``run.sqlite`` are SQLite's, which overwrites and removes them unasked.
    """
    kinds: dict[str, Callable[[bytes], bool]] = {
        "": _is_ours,
        "-wal": lambda header: header[:4] in _WAL or not any(header),
        "-shm": lambda header: header[:4] == _SHARED_MEMORY or not any(header),
        "-journal": lambda header: header[:8] == _JOURNAL or not any(header),
    }
    read_here = any(reader.folder.resolve() == folder.resolve() for reader in readers)
    for suffix, is_its_own in kinds.items():
        path = folder / f"{FILE}{suffix}"
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise RunLogError(f"{path} is a link or no plain file; a run log's are. Give another path.")
        header = b"" if read_here else _beginning(path)
        if not status.st_size:
            if status.st_nlink > 1:
                raise RunLogError(f"{path} is empty and stands elsewhere too, by a hard link. Give another path.")
        elif not read_here and not is_its_own(header):
            raise RunLogError(_of_another(path, header))


def _is_ours(header: bytes) -> bool:
    # it may be new, with its application still in the write-ahead log
    return header[:16] == _SQLITE and int.from_bytes(header[68:72], "big") in (0, APPLICATION)


def _of_another(path: Path, header: bytes) -> str:
    if header[:16] == _SQLITE:
        return f"{path} is an SQLite file of another program, no run log of gradwatch. Give another path."
    return (
        f"{path} is no run log: it begins with {header[:16]!r} and not as an SQLite file does. It was damaged, or "
        "another program made it. Give another path, or remove it."
        if path.name == FILE
        else f"{path} is another program's: it begins with {header[:16]!r}. Give another path, or remove it."
    )


def _beginning(path: Path) -> bytes:
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(number, _HEADER)
    finally:
        os.close(number)
