"""Reading of a run log, also while it is being written or after its process was killed.

Reading neither changes the file nor executes anything in it. Every defect of the file raises a `RunLogError`.
"""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.errors import RunLogError
from gradwatch.history.history import History
from gradwatch.records import Alarm, Facts, Family, Incident
from gradwatch.rules import RULES
from gradwatch.runlog.checks import check_kind, connection_to_look, told_of
from gradwatch.runlog.lock import is_written
from gradwatch.runlog.own import closed_by, opened_by
from gradwatch.runlog.plain import checked, from_json
from gradwatch.runlog.rows import Count, row_of
from gradwatch.runlog.schema import FILE, OF_SESSION
from gradwatch.runlog.session import Environment, Series, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gradwatch.records import Floats, Row
    from gradwatch.rules import Rule


_DAMAGE = (
    sqlite3.Error,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    RuntimeError,  # nested too deeply, or a loop of links
    MemoryError,
)
# SQLite's messages for files that it cannot access
_OF_THE_DISK = ("unable to open database file", "database is locked", "disk I/O error", "attempt to write a readonly")
_OF_THE_DISK_TOLD = "Expected a path that can be read: check the path, its permissions and the disk."
_MOST_NUMBERS = 2**31  # norms in memory; a log that needs more must be a large file itself


class RunLog:
    """A run log that is open for reading.

    Args:
        path: the folder of the run log, or the file in it.

    Raises:
        RunLogError: there is no run log, it is damaged, or it has another format.

    Attributes:
        folder: the folder of the run log.
        path: the path of the file, with links resolved.
        layers: names of the layers, which are the columns of all arrays.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path = Path(path)
        with self.reading():
            self._path = path / FILE if path.is_dir() else path
            self.folder = self._path.parent
            if not self._path.is_file():
                raise RunLogError(
                    f"There is no run log in {path}: expected a folder with {FILE}, as attach(log=...) creates it."
                )
            self.path = self._path.resolve()
            opened_by(self)
        with ExitStack() as undo:
            undo.callback(closed_by, self)
            self._db = self._connect()
            undo.callback(self._db.close)
            with self.reading():
                self._open()
            undo.pop_all()

    def _open(self) -> None:
        columns = self._db.execute("SELECT name, elements, matrix, fan_in FROM layers ORDER BY place").fetchall()
        if not columns:
            raise ValueError("it names no layers")
        kinds = checked(list[tuple[str, Count, bool, Count]], columns)
        self.layers: tuple[str, ...] = tuple(name for name, *_ in kinds)
        self._columns = [(elements, matrix, fan_in) for _, elements, matrix, fan_in in kinds]

    def _connect(self) -> sqlite3.Connection:
        with self.reading():
            with closing(connection_to_look(self.path)) as db:
                check_kind(db, self._path)  # leaves a file unchanged that it refuses
            name = f"{self.path.as_uri()}?mode=ro"
            db = sqlite3.connect(name, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
            try:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except sqlite3.OperationalError:
                db.close()  # the folder is read-only, so no process writes and nothing can change
                db = sqlite3.connect(f"{name}&immutable=1", uri=True, isolation_level=None, check_same_thread=False)
            except sqlite3.DatabaseError:
                db.close()
                raise
        return db

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raise every error inside the context as a `RunLogError`."""
        try:
            yield
        except RunLogError:
            raise
        except _DAMAGE as error:
            if "not a database" in str(error):
                raise told_of(self._path, error) from error
            what = " ".join(str(error).split())[:300]
            passing = isinstance(error, OSError) or any(words in what for words in _OF_THE_DISK)
            cause = _OF_THE_DISK_TOLD if passing else "It is damaged, or was written by another program."
            raise RunLogError(f"The run log {self._path} cannot be read: {what}. {cause}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        closed_by(self)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Contents.

    @property
    def is_written(self) -> bool:
        """True while a process writes to the run log."""
        return is_written(self.folder)

    @property
    def sessions(self) -> list[Session]:
        """The sessions that wrote the run log, in order."""
        statement = (
            "SELECT environment, facts, session, pid, host, started, ended, first_step, until_step FROM sessions "
            "ORDER BY session"
        )
        with self.reading():
            found = self._db.execute(statement).fetchall()
            if not found:
                raise ValueError("it names no session")
            return [self._session(*columns) for columns in found]

    def _session(self, environment: str, facts: str, *numbers: Any) -> Session:
        from_json(Environment, environment)
        names = ("number", "pid", "host", "started", "ended", "first_step", "until_step")
        told = {"environment": from_json(dict[str, Any], environment), "facts": from_json(Facts, facts)}
        return checked(Session, told | dict(zip(names, numbers, strict=True)))

    def end(self) -> tuple[int, int, float | None]:
        """Return the last step, the number of rows of the run, and its last loss, which is None if it is NaN or unknown."""
        with self.reading():
            (count,) = self._db.execute("SELECT count(*) FROM line").fetchone()
            statement = "SELECT step, loss FROM line ORDER BY id DESC LIMIT 1"
            step, loss = self._db.execute(statement).fetchone() or (-1, None)
            return int(step), int(count), None if loss is None else float(loss)

    def series(self, since: int = -1) -> Series:
        """Return the scalars of the rows with an id above ``since``."""
        statement = "SELECT id, step, loss, global_norm, clip_coefficient, skipped FROM line WHERE id > ? ORDER BY id"
        with self.reading():
            rows = self._db.execute(statement, (since,)).fetchall()
            columns = list(zip(*rows, strict=True)) if rows else [()] * 6
            kinds = (np.int64, np.int64, np.float64, np.float64, np.float64, np.bool_)
            made: list[NDArray[Any]] = [
                np.array(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)
            ]
            return Series(*made, *self._settings_of(made[0]).T)

    def _settings_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return the learning rate and the loss scale of rows, shape (n, 2): those of the last change in their session."""
        settings = np.full((len(ids), 2), np.nan)
        known = self._has("step_settings")
        found = self._db.execute("SELECT * FROM step_settings ORDER BY id").fetchall() if known else []
        if found:
            changed = np.array([one for one, *_ in found], dtype=np.int64)
            values = np.array([numbers for _, *numbers in found], dtype=np.float64)
            place = np.searchsorted(changed, ids, side="right") - 1
            same = (place >= 0) & (changed[place] // OF_SESSION == ids // OF_SESSION)
            settings[same] = values[place[same]]
        return settings

    def _has(self, table: str) -> bool:
        """Return whether there is a table that logs of earlier versions lack."""
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None

    def times(self, ids: NDArray[np.int64]) -> Floats:
        """Return the times of rows in seconds since 1970, shape (n,), interpolated between the times that were recorded."""
        with self.reading():
            known = np.array(self._db.execute("SELECT id, time FROM clock ORDER BY id").fetchall(), dtype=np.float64)
            if not len(known):
                return np.full(len(ids), np.nan)
            return np.interp(ids.astype(np.float64), known[:, 0], known[:, 1])

    def norms(
        self,
        weight: bool = False,  # noqa: FBT001, FBT002
        last: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the steps (n,) and norms (n, L) of the rows that have norms, oldest first.

        Args:
            weight: whether to return weight norms instead of gradient norms.
            last: largest number of rows to return, counted from the last; None: all.
        """
        column = "weight" if weight else "gradient"
        statement = (
            f"SELECT step, norms.{column} FROM line JOIN norms USING (id) "  # noqa: S608
            f"WHERE norms.{column} IS NOT NULL ORDER BY id DESC LIMIT ?"
        )
        with self.reading():
            most = -1 if last is None else last  # in SQLite, -1 means no limit
            (count,) = self._db.execute(f"SELECT count(*) FROM ({statement})", (most,)).fetchone()  # noqa: S608
            self._check_size(count)
            steps = np.zeros(count, dtype=np.int64)
            norms = np.full((count, len(self.layers)), np.nan, dtype=np.float32)
            for place, (step, blob) in enumerate(self._db.execute(statement, (count,)), 1):
                found = np.frombuffer(blob, dtype="<f4")
                steps[-place], norms[-place, : len(found)] = step, found
            return steps, norms

    def _check_size(self, rows: int) -> None:
        """Raise a `ValueError` if the file is too small to hold the norms of ``rows`` rows."""
        if rows * len(self.layers) > max(_MOST_NUMBERS, 16 * self._path.stat().st_size):
            raise ValueError(
                f"it is too small to hold the {rows} rows of {len(self.layers)} layers that it claims to have"
            )

    def nonfinite(self, weight: bool = False) -> Iterator[tuple[int, NDArray[np.uint8]]]:  # noqa: FBT001, FBT002
        """Yield each step with gradients (or weights) that are not finite, and a mask (L,) that is above 0 for their layers."""
        column = "weight" if weight else "gradient"
        statement = (
            f"SELECT step, nonfinite.{column} FROM line JOIN nonfinite USING (id) "  # noqa: S608
            f"WHERE nonfinite.{column} IS NOT NULL ORDER BY id"
        )
        with self.reading():
            for step, blob in self._db.execute(statement):
                mask = np.zeros(len(self.layers), dtype=np.uint8)
                mask[: len(blob)] = np.frombuffer(blob, dtype=np.uint8)
                yield int(step), mask

    @property
    def incidents(self) -> list[Incident]:
        """All incidents in the order in which they opened, including those of steps that were made again later."""
        return self._records(Incident, "SELECT incident FROM incidents ORDER BY session, number")

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms, one for each change of a rule's state, oldest first."""
        return self._records(Alarm, "SELECT alarm FROM alarms ORDER BY rowid")

    @property
    def flights(self) -> list[tuple[int, str, dict[str, Any]]]:
        """The records of the flight recorder, oldest first, each with its step and its reason."""
        with self.reading():
            rows = self._db.execute("SELECT step, reason, record FROM flights ORDER BY rowid").fetchall()
            return [(int(step), str(reason), from_json(dict[str, Any], record)) for step, reason, record in rows]

    @property
    def notes(self) -> list[str]:
        """All notes of gradwatch about the run, oldest first."""
        with self.reading():
            notes = [note for (note,) in self._db.execute("SELECT note FROM notes ORDER BY rowid")]
            return list(dict.fromkeys(checked(list[str], notes)))

    def latest(self, series: int) -> tuple[tuple[Any, ...] | None, Floats, Floats]:
        """Return the row of the table ``latest``, and the losses and global norms of the last ``series`` rows."""
        with self.reading():
            self._db.execute("BEGIN")  # both queries must see the same state although the training goes on
            try:
                found = self._db.execute(
                    "SELECT step, moment, gradient, weight, nonfinite, closeness, closest FROM latest"
                ).fetchone()
                statement = "SELECT loss, global_norm FROM line ORDER BY id DESC LIMIT ?"
                rows = np.array(self._db.execute(statement, (series,)).fetchall(), dtype=np.float64).reshape(-1, 2)
            finally:
                self._db.execute("COMMIT")
        return found, rows[::-1, 0], rows[::-1, 1]

    def _records(self, kind: type[Any], statement: str) -> list[Any]:
        with self.reading():
            return [from_json(kind, text) for (text,) in self._db.execute(statement)]

    # For a replay.

    def rules(self) -> tuple[list[Rule], list[str]]:
        """Return the last session's rules with their thresholds, and the codes of rules that are not part of gradwatch."""
        known = {rule.code: rule for rule in RULES}
        rules, unknown = [], []
        with self.reading():
            for told in self.sessions[-1].environment.get("rules", []):
                kind = known.get(told["code"])
                if kind is not None and kind.__name__ == told["rule"]:
                    rules.append(kind(**told["settings"]))
                else:
                    unknown.append(str(told["code"]))
        return rules, unknown

    def history(self) -> History:
        """Return an empty history with the layers of this run."""
        sizes, matrices, fan_in = zip(*self._columns, strict=True)
        history = History(self.layers, sizes, matrices, fan_in)
        last = self.sessions[-1]
        history.know(replace(last.facts, layers=len(self.layers)))
        with self.reading():
            (order,) = self._db.execute("SELECT backward_order FROM sessions ORDER BY session DESC LIMIT 1").fetchone()
            if order is not None:
                found = np.frombuffer(order, dtype="<i4")
                if len(found) > len(self.layers) or (found < 0).any() or (found > len(self.layers)).any():
                    raise ValueError("the backward order contains layers that are not in its table of layers")
                history.know_order(np.concatenate([found, np.arange(len(found), len(self.layers))]).astype(np.intp))
        return history

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the run as they were measured, oldest first; norms that were removed by thinning are NaN."""
        family = self.sessions[-1].facts.family
        statement = (
            "SELECT step, line.loss, global_norm, clip_coefficient, norms.gradient, norms.weight, "
            "rate, dead_share, unchanged, applied, nonfinite.gradient, nonfinite.weight, counts, culprits, "
            "source, clipped, provenances.loss, processes, {}, {}, {}, {} "
            "FROM line LEFT JOIN norms USING (id) LEFT JOIN samples USING (id) LEFT JOIN nonfinite USING (id) "
            "LEFT JOIN provenances USING (provenance) {} {} {} {} ORDER BY id"
        )
        with self.reading():
            (count,) = self._db.execute("SELECT count(*) FROM steps").fetchone()
            self._check_size(count)
            columns = {"arrivals": "arrived", "families": "family", "buffers": "well", "tasks": "tasks.id"}
            told = [column if self._has(table) else "NULL" for table, column in columns.items()]
            joins = [f"LEFT JOIN {table} USING (id)" if self._has(table) else "" for table in columns]
            arrived, rate = None, None
            for *numbers, came, by, well, task in self._db.execute(statement.format(*told, *joins)):
                arrived = arrived if came is None else came
                family = family if by is None else checked(Family, by)  # type: ignore[arg-type]
                row = row_of(tuple(numbers), arrived, len(self.layers), family)
                rate = rate if row.rate is None else row.rate  # kept where it changes
                buffers_well = None if well is None else bool(well)
                yield row._replace(rate=rate, begins_task=task is not None, buffers_well=buffers_well)
