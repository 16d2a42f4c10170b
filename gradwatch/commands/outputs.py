"""Files that a command writes: either all or none, without replacing files that gradwatch did not write."""

from __future__ import annotations

import secrets
import shutil
import stat
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.errors import UsageError
from gradwatch.runlog.own import files_of, is_open_here

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gradwatch.runlog import RunLog


class Output(NamedTuple):
    """A file to write.

    Args:
        path: path of the file.
        write: writes a new file at the given path.
        is_own: returns whether a file is an earlier output of this kind, written by gradwatch.
    """

    path: Path
    write: Callable[[Path], object]
    is_own: Callable[[Path], bool]


def check_outputs(log: RunLog, outputs: Sequence[Output], option: str, *, overwrite: bool) -> None:
    """Raise a `UsageError` if one of the files must not be written. No file is changed.

    Args:
        log: run log whose own files are never replaced.
        outputs: files to write.
        option: command-line option that sets the path, named in the error.
        overwrite: whether files of other programs may be replaced.
    """
    for path, _, is_own in outputs:
        with _told(path, option):
            if path.resolve() in files_of(log.path) or is_open_here(path):
                raise UsageError(f"{path} is part of a run log. Give another path with {option}.")
            status = _status(path)
            if status is None or _is_device(status):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} exists and is not a regular file. Give another path with {option}.")
            if status.st_size and not overwrite and not is_own(path):
                raise UsageError(
                    f"{path} exists and was not written by gradwatch. Give another path with {option}, or replace the "
                    "file with --overwrite."
                )


def write_outputs(outputs: Sequence[Output], option: str) -> None:
    """Write the files, and create missing folders. If writing fails, the existing files stay unchanged.

    Each file is first written under a temporary name in the same folder.

    Raises:
        UsageError: one of them cannot be written.
    """
    with ExitStack() as undo:
        done = []
        for path, write, _ in outputs:
            with _told(path, option):
                status = _status(path)
                if status is not None and _is_device(status):
                    write(path)
                    continue
                place = path.resolve()  # a link is kept, and its target is replaced
                for folder in made_folders(place.parent):
                    undo.callback(_removed, folder)
                new = place.with_name(f".gradwatch-{secrets.token_hex(4)}")
                undo.callback(_removed, new)
                write(new)
                if status is not None:
                    shutil.copymode(place, new)
                done.append((new, place))
        for new, place in done:
            with _told(place, option):
                new.replace(place)
        undo.pop_all()


def made_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents, and return those that were missing, outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _told(path: Path, option: str) -> Iterator[None]:
    """Raise errors of the file system as a `UsageError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UsageError(f"{path} cannot be written: {error}. Give another path with {option}.") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_device(status: os.stat_result) -> bool:
    """Return True for a terminal, a pipe or another device, where writing does not replace anything."""
    return stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode)


def _removed(path: Path) -> None:
    with suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()
