"""The folder of a run log that is to be written: created, locked and checked, or restored if the run log is refused."""

from __future__ import annotations

import errno
import os
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from gradwatch.errors import RunLogError
from gradwatch.runlog.checks import check_kind, connection_to_look
from gradwatch.runlog.lock import FILE as LOCK
from gradwatch.runlog.lock import WriterLock
from gradwatch.runlog.own import closed_by, files_of, opened_by
from gradwatch.runlog.schema import FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# errors that are due to the path itself, not to the disk, so that trying again does not help
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
_MOST_SHOWN = 80  # characters of a path


class Place:
    """The folder of a run log, reserved for one writer until `release` or `undo`.

    Args:
        folder: folder of the run log; it is created if it is missing.
        layers: names of the model's layers, in order.

    Raises:
        RunLogError: no folder can have this path; or the run log in it belongs to another program or another model, is damaged,
            or is being written. Nothing was changed.
        OSError: the folder cannot be written to. Nothing was changed.

    Attributes:
        path: path of the SQLite file.
    """

    def __init__(self, folder: Path, layers: Sequence[str]) -> None:
        self._made: list[Path] = []
        self._lock: WriterLock | None = None
        self._sizes: dict[Path, int | None] = {}
        try:
            self._make(folder)
            self._lock = WriterLock(folder)
            self.path = folder.resolve() / FILE
            self._sizes = {path: _size(path) for path in files_of(self.path) if path.name != LOCK}
            opened_by(self)
            if self._sizes[self.path]:
                self._check_database(folder, layers)
        except BaseException as error:
            self.undo()
            if isinstance(error, OSError) and error.errno in _IMPOSSIBLE:
                raise _impossible(folder, error) from error
            raise

    def _make(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise RunLogError(
                f"The run log's path {folder} is a file; expected a folder, or a path that does not exist yet."
            )
        try:
            for one in reversed([one for one in (folder, *folder.parents) if not os.path.lexists(one)]):
                with suppress(FileExistsError):  # another process created it first
                    one.mkdir()
                    self._made.append(one)
            folder.mkdir(exist_ok=True)
        except ValueError as error:  # a null character, or one that the system's encoding lacks
            raise _impossible(folder, error) from error

    def _check_database(self, folder: Path, layers: Sequence[str]) -> None:
        with closing(connection_to_look(self.path)) as db:
            check_kind(db, folder / FILE, empty=True)
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return
            known = [name for (name,) in db.execute("SELECT name FROM layers ORDER BY place")]
        for place, (before, now) in enumerate(zip(known, layers, strict=False)):
            if before != now:
                raise RunLogError(
                    f"The run log {folder} is of another model: its layer {place} is {before!r}, but layer {place} of this "
                    f"model is {now!r}. Give this run its own path."
                )

    def release(self) -> None:
        """Release the folder and keep what was written. Call it after SQLite has closed the file; it can be called twice."""
        closed_by(self)
        if self._lock is not None:
            self._lock.release()

    def undo(self) -> None:
        """Release the folder, and restore files and folders as they were found. Call it after SQLite has closed the file."""
        closed_by(self)
        for path, size in self._sizes.items():
            with suppress(OSError):
                if size is None:
                    path.unlink()
                elif size == 0 and _size(path):
                    os.truncate(path, 0)
        if self._lock is not None:
            self._lock.undo()
        for one in reversed(self._made):
            with suppress(OSError):  # another program has created a file in it
                one.rmdir()


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def _impossible(folder: Path, error: Exception) -> RunLogError:
    shown = repr(str(folder))
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[: _MOST_SHOWN // 2]}...{shown[-_MOST_SHOWN // 4 :]} ({len(str(folder))} characters)"
    reason = error.strerror if isinstance(error, OSError) else error
    return RunLogError(
        f"No run log can be written in {shown}: {reason}. Expected the path of a folder that exists or can be created, "
        'such as "runs/today". Give another path.'
    )
