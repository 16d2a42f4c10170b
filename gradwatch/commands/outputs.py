"""Files that a command writes: all of them or none, and none in the place of a file that gradwatch did not write."""

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
    """A file to write: ``write`` fills a new one, ``is_own`` says whether a file is an earlier one of gradwatch's."""

    path: Path
    write: Callable[[Path], object]
    is_own: Callable[[Path], bool]


def check_outputs(log: RunLog, outputs: Sequence[Output], option: str, *, overwrite: bool) -> None:
    """Raise a `UsageError` where one of the files may not be written; nothing is changed.

    Args:
        log: its own files are never replaced.
        outputs: what is to be written.
        option: the one that names another place, for the error.
        overwrite: the user has said that other programs' files may be replaced.
    """
    for path, _, is_own in outputs:
        with _told(path, option):
            if path.resolve() in files_of(log.path) or is_open_here(path):
                raise UsageError(f"{path} is part of a run log. Give another place with {option}.")
            status = _status(path)
            if status is None or _is_device(status):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is there already, and no plain file. Give another place with {option}.")
            if status.st_size and not overwrite and not is_own(path):
                raise UsageError(
                    f"{path} is there already, and no such file of gradwatch's. Give another place with {option}, or "
                    "--overwrite to replace it."
                )


def write_outputs(outputs: Sequence[Output], option: str) -> None:
    """Write the files: each beside its place at first, so that a failure leaves what was there; folders are made.

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
                place = path.resolve()  # a link stays, what it leads to is replaced
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
    """Make a folder and those above it; return those that were missing, the outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _told(path: Path, option: str) -> Iterator[None]:
    """Turn what the system says of a path into a `UsageError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise UsageError(f"{path} cannot be written: {error}. Give another place with {option}.") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_device(status: os.stat_result) -> bool:
    """True for a terminal, a pipe and the like: what is written there replaces nothing."""
    return stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode)


def _removed(path: Path) -> None:
    with suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()
