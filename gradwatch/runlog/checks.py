"""Whether a file is a run log at all, asked before anything else is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.errors import RunLogError
from gradwatch.runlog.schema import APPLICATION, VERSION

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path


def told_of(path: Path, error: Exception) -> RunLogError:
    """Return what to say of a file that SQLite cannot read.

    It is opened here only when SQLite has found that it is none of its files: closing a file anywhere in a process takes away
    the locks that SQLite holds on it.
    """
    if "not a database" in str(error):
        with path.open("rb") as file:
            beginning = file.read(16)
        if beginning != b"SQLite format 3\0":
            return RunLogError(
                f"{path} is no run log: it begins with {beginning!r} and not as an SQLite file does. It was damaged, or "
                "another program made it. Give another path, or remove it."
            )
    return RunLogError(f"{path} is damaged: {error}. Give another path, or remove it.")


def check_kind(connection: sqlite3.Connection, path: Path) -> None:
    """Raise a `RunLogError` unless this SQLite file is a run log that this version can read."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        raise RunLogError(f"{path} holds nothing yet. Wait for the first step of its training.")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise RunLogError(f"{path} is an SQLite file of another program, no run log of gradwatch. Give another path.")
    if version != VERSION:
        raise RunLogError(
            f"{path} is a run log of format {version}; this gradwatch knows format {VERSION}. Read it with the version that "
            "wrote it, or give another path."
        )
