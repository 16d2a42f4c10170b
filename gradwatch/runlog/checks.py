"""Checks that a file is a run log of this format, made before anything else is read from it."""

from __future__ import annotations

import functools
import re
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from gradwatch.errors import RunLogError
from gradwatch.runlog.schema import ADDED, APPLICATION, TABLES, VERSION

if TYPE_CHECKING:
    from pathlib import Path


def told_of(path: Path, error: Exception) -> RunLogError:
    """Return the error for a file that begins as an SQLite file but that SQLite cannot read."""
    return RunLogError(f"{path} is damaged: {error}. Give another path, or remove it.")


def connection_to_look(database: Path) -> sqlite3.Connection:
    """Open a database read-only. If it consists of a single file, SQLite does not create other files next to it."""
    beside = (database.with_name(f"{database.name}{suffix}") for suffix in ("-wal", "-journal"))
    waits = any(path.exists() and path.stat().st_size for path in beside)
    name = f"{database.as_uri()}?mode=ro{'' if waits else '&immutable=1'}"
    return sqlite3.connect(name, uri=True, timeout=5, isolation_level=None)


def check_kind(connection: sqlite3.Connection, path: Path, *, empty: bool = False) -> None:
    """Raise a `RunLogError` unless this SQLite file is a run log that this version can read, or, if ``empty``, has no tables."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not tables and empty and application in (0, APPLICATION) and version in (0, VERSION):
        return
    if not tables and not empty:
        raise RunLogError(f"{path} holds nothing yet. Wait for the first step of its training.")
    if application != APPLICATION:
        raise RunLogError(
            f"{path} is an SQLite file of another program, not a run log of gradwatch. Give another path."
        )
    if version != VERSION:
        raise RunLogError(
            f"{path} is a run log of format {version}; this version of gradwatch supports format {VERSION}. Read it with the "
            "version that wrote it, or give another path."
        )
    _check_schema(connection, path)


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise a `RunLogError` if the tables are not those of a run log; a view in their place would execute foreign SQL."""
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master"))
    for name, statement in _schema().items():
        if name not in found:
            if name in ADDED:
                continue
            raise RunLogError(f"{path} is damaged: it lacks the table {name}. Give another path, or remove it.")
        if _bare(found[name]) != statement:
            raise RunLogError(
                f"{path} is damaged: its table {name} differs from that of a run log. Give another path, or remove it."
            )


@functools.cache
def _schema() -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join((TABLES, *ADDED.values())))
        return {name: _bare(statement) for name, statement in db.execute("SELECT name, sql FROM sqlite_master")}


def _bare(statement: object) -> str:
    """Return a statement without comments, line breaks and indentation."""
    return " ".join(re.sub(r"--[^\n]*", "", str(statement)).split())
