"""Writing of a run log: one session, from its first row to its end."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.runlog.checks import told_of
from gradwatch.runlog.moment import Moment
from gradwatch.runlog.place import Place
from gradwatch.runlog.plain import storable, to_json
from gradwatch.runlog.schema import ADDED, APPLICATION, FILE, OF_SESSION, TABLES, VERSION, packed, packed_or_one
from gradwatch.runlog.thinning import LAST
from gradwatch.runlog.written import UNKNOWN, Written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradwatch.records import Facts, Floats, Incident, Provenance, Row, Snapshot
    from gradwatch.runlog.batch import Batch

_THIN_EVERY = 1000  # rows
_PAGE = 8192  # bytes: half-empty pages after thinning waste less than with larger ones, and rows of 300 layers fit


class Store:
    """A run log that is open for writing, for one session.

    Args:
        folder: folder of the file; it is created if it is missing.
        columns: name, number of elements, whether it is a matrix, and fan-in of each layer.
        environment: environment of the run; see `gradwatch.runlog.environment`.
        facts: facts about the model.

    Raises:
        RunLogError: no folder can have this path; or the file belongs to another program or another model, is damaged, or is
            being written. Nothing was changed.
        OSError: the file cannot be written. Nothing was changed.
    """

    def __init__(
        self, folder: Path, columns: Sequence[tuple[str, int, int, int]], environment: dict[str, Any], facts: Facts
    ) -> None:
        self.folder = folder
        self._path = folder / FILE
        self._db: sqlite3.Connection | None = None
        self._done = Written()
        try:
            self._place = Place(folder, [storable(name) for name, *_ in columns])
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _told(self._path, error) from error
        try:
            self._open()
            self._begin(columns, environment, facts)
        except BaseException as error:
            self._disconnect()
            self._place.undo()
            if isinstance(error, (sqlite3.DatabaseError, UnicodeDecodeError)):
                raise _told(self._path, error) from error
            raise

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _open(self) -> None:
        db = self._db = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")  # safe if the process is killed, and commits do not wait for the disk
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute(f"PRAGMA page_size = {_PAGE}")
            db.execute("PRAGMA journal_mode = WAL")
            # the transaction includes the first session, so a process that is killed before its end leaves an empty file
            db.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; {TABLES}"
            )
        else:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
        known = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        for table in ADDED.keys() - known:  # the log is new, or of an earlier version
            db.execute(ADDED[table])
        stat = self._path.stat()
        self._file = stat.st_dev, stat.st_ino

    def _begin(self, columns: Sequence[tuple[str, int, int, int]], environment: dict[str, Any], facts: Facts) -> None:
        db = self._connection
        self._add_layers(columns)
        done = db.execute(
            "INSERT INTO sessions (pid, host, started, environment, facts) VALUES (?, ?, ?, ?, ?)",
            (os.getpid(), socket.gethostname(), time.time(), to_json(environment), to_json(facts)),
        )
        self._done.session = int(done.lastrowid or 0)
        db.execute("COMMIT")

    def _begin_again(self) -> None:
        """Begin a new session, since rows of steps that are made again must neither replace nor follow the earlier ones."""
        now, done = time.time(), self._done
        self._of_session("ended", now)
        made = self._connection.execute(
            "INSERT INTO sessions (pid, host, started, environment, facts, backward_order) "
            "SELECT pid, host, ?, environment, facts, backward_order FROM sessions WHERE session = ?",
            (now, done.session),
        )
        done.session, done.started = int(made.lastrowid or 0), False
        done.settings, done.rate, done.arrived = UNKNOWN, None, b""

    def _add_layers(self, columns: Sequence[tuple[str, int, int, int]]) -> None:
        (known,) = self._connection.execute("SELECT count(*) FROM layers").fetchone()
        new = [(place, storable(name), *numbers) for place, (name, *numbers) in enumerate(columns)][known:]
        self._connection.executemany("INSERT INTO layers VALUES (?, ?, ?, ?, ?)", new)

    def is_removed(self) -> bool:
        """Return True if the file is no longer at its path, so that anything written would be lost."""
        try:
            stat = self._path.stat()
        except OSError:
            return True
        return (stat.st_dev, stat.st_ino) != self._file

    def write(self, batches: Sequence[Batch]) -> None:
        """Write either all batches or none; raises `sqlite3.Error` if writing fails."""
        db, before = self._connection, self._done
        self._done = before.copy()
        try:
            db.execute("BEGIN IMMEDIATE")
            for batch in batches:
                self._write(batch)
            if self._done.since_thinned >= _THIN_EVERY:
                self._thin()
            db.execute("COMMIT")
        except BaseException:
            self._done = before
            if db.in_transaction:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise

    def write_ahead(self, batch: Batch) -> None:
        """Write rows that a later batch will contain again; the record of what was written is not advanced."""
        before = self._done
        self.write([batch])
        self._done = replace(before, provenances=self._done.provenances)

    def close(self, *, ended: bool = False) -> None:
        """Close the file; if ``ended``, record that the session has ended."""
        try:
            if self._db is not None:
                with suppress(sqlite3.Error):
                    if ended and not self.is_removed():
                        self._of_session("ended", time.time())
        finally:
            self._disconnect()
            self._place.release()

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _of_session(self, column: str, value: str | bytes | float) -> None:
        statement = f"UPDATE sessions SET {column} = ? WHERE session = ?"  # noqa: S608  the column is a name of the schema
        self._connection.execute(statement, (value, self._done.session))

    def _write(self, batch: Batch) -> None:
        db = self._connection
        if batch.again and self._done.started:
            self._begin_again()
        session = self._done.session
        if batch.columns:
            self._add_layers(batch.columns)
        if batch.facts is not None:
            self._of_session("facts", to_json(batch.facts))
        if batch.order is not None:
            self._of_session("backward_order", batch.order.astype("<i4").tobytes())
        if len(batch.steps):
            self._rows(batch)
        for alarm in batch.alarms:
            layer = None if alarm.layer is None else storable(alarm.layer)
            told = (session, alarm.step, storable(alarm.code), alarm.state, layer, alarm.value, to_json(alarm))
            db.execute("INSERT INTO alarms VALUES (?, ?, ?, ?, ?, ?, ?)", told)
        for step, note in batch.notes:
            db.execute("INSERT INTO notes VALUES (?, ?, ?)", (session, step, storable(note)))
        if batch.snapshot is not None:
            self._incidents(batch.snapshot.incidents)
            self._latest(batch.snapshot, batch.time)
        for step, reason, record in batch.flights:
            told_of = (session, step, batch.time, storable(reason), record)
            db.execute("INSERT INTO flights VALUES (?, ?, ?, ?, ?)", told_of)

    def _rows(self, batch: Batch) -> None:
        db, done, steps = self._connection, self._done, batch.steps.tolist()
        base = done.session * OF_SESSION
        if not done.started:
            done.started = True
            self._of_session("first_step", steps[0])
            db.execute(
                "UPDATE sessions SET until_step = ? WHERE session < ? AND (until_step IS NULL OR until_step > ?)",
                (steps[0], done.session, steps[0]),
            )
        special = dict(batch.special)
        provenances: list[int] = []
        weights: list[bytes | None] = []
        for place, step in enumerate(steps):
            row = special.get(place)
            if row is not None:  # other rows have the provenance of the row before them
                done.provenance = self._number_of(row.provenance)
                self._special(base + step, row, float(batch.scalars.clip_coefficient[place]))
            provenances.append(done.provenance)
            weights.append(None if row is None or row.weight_norm is None else packed(row.weight_norm))
        ids = [base + step for step in steps]
        told = batch.scalars
        scalars = (told.loss, told.global_norm, told.clip_coefficient, told.skipped.astype(np.int64))
        numbers = zip(ids, *(values.tolist() for values in scalars), provenances, strict=True)
        db.executemany("INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?)", numbers)
        self._settings(ids, np.stack([told.learning_rate, told.loss_scale], axis=1))
        keep = [done.thinning.take(step) for step in steps]
        raw, width = batch.gradient.astype("<f4", copy=False).tobytes(), 4 * batch.gradient.shape[1]
        places = range(len(steps)) if batch.places is None else batch.places
        norms = (
            (ids[place], keep[place], raw[n * width : (n + 1) * width], weights[place])
            for n, place in enumerate(places)
        )
        db.executemany("INSERT OR REPLACE INTO norms VALUES (?, ?, ?, ?)", norms)
        db.execute("INSERT OR REPLACE INTO clock VALUES (?, ?)", (ids[-1], batch.time))
        done.since_thinned += len(steps)

    def _settings(self, ids: Sequence[int], settings: Floats) -> None:
        """Write ``settings``, shape (n, 2), of the rows at which they differ from those of the row before in the session."""
        done, before = self._done, np.concatenate([self._done.settings[None], settings[:-1]])
        differs = ~((settings == before) | (np.isnan(settings) & np.isnan(before))).all(axis=1)
        changed = ((ids[place], *settings[place].tolist()) for place in np.flatnonzero(differs).tolist())
        self._connection.executemany("INSERT OR REPLACE INTO step_settings VALUES (?, ?, ?)", changed)
        done.settings = settings[-1]

    def _number_of(self, provenance: Provenance) -> int:
        known = self._done.provenances
        if provenance not in known:
            statement = "INSERT INTO provenances (source, clipped, loss, processes) VALUES (?, ?, ?, ?)"
            known[provenance] = int(self._connection.execute(statement, provenance).lastrowid or 0)
        return known[provenance]

    def _special(self, key: int, row: Row, coefficient: float) -> None:
        rate = row.rate if row.rate is not self._done.rate else None
        applied = row.applied if row.applied != coefficient else None
        samples = (packed_or_one(rate), packed_or_one(row.dead_share), packed_or_one(row.unchanged), applied)
        if any(one is not None for one in samples):
            self._done.rate = row.rate
            self._connection.execute("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)", (key, *samples))
        arrived = b"" if row.arrived is None else row.arrived.tobytes()
        if arrived and arrived != self._done.arrived:
            self._done.arrived = arrived
            self._connection.execute("INSERT OR REPLACE INTO arrivals VALUES (?, ?)", (key, arrived))
        if row.family != self._done.family:
            self._done.family = row.family
            self._connection.execute("INSERT OR REPLACE INTO families VALUES (?, ?)", (key, row.family))
        if row.buffers_well not in (None, self._done.buffers_well):
            self._done.buffers_well = row.buffers_well
            self._connection.execute("INSERT OR REPLACE INTO buffers VALUES (?, ?)", (key, row.buffers_well))
        if row.begins_task:
            self._connection.execute("INSERT OR REPLACE INTO tasks VALUES (?)", (key,))
        bad = row.nonfinite_weight
        if row.nonfinite is not None or (bad is not None and bad.any()):
            found = (
                key,
                None if row.nonfinite is None else row.nonfinite.astype(np.uint8).tobytes(),
                None if bad is None else bad.astype(np.uint8).tobytes(),
                None if row.counts is None else to_json(dict(row.counts)),
                None if row.culprits is None else to_json(row.culprits),
            )
            self._connection.execute("INSERT OR REPLACE INTO nonfinite VALUES (?, ?, ?, ?, ?)", found)

    def _incidents(self, incidents: Sequence[Incident]) -> None:
        done = self._done
        known, done.incidents = done.incidents, {one.number: one for one in incidents}
        for number, one in done.incidents.items():
            if known.get(number) is one:
                continue
            home = done.homes.setdefault(number, done.session)
            suspect = None if one.suspect is None else storable(one.suspect)
            told = (one.opened_step, one.closed_step, one.kind, one.severity, one.verdict, suspect, to_json(one))
            statement = "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            self._connection.execute(statement, (home, number, *told))
            for step, closed in ((one.opened_step, False), (one.closed_step, True)):
                around = None if step is None else done.thinning.around(number, step, closed=closed)
                if around is not None:
                    base = (done.session if closed else home) * OF_SESSION
                    ids = base + max(0, around[0]), base + around[1]
                    self._connection.execute("UPDATE norms SET keep = 1 WHERE id BETWEEN ? AND ?", ids)

    def _latest(self, snapshot: Snapshot, now: float) -> None:
        arrays = (snapshot.grad_norm, snapshot.weight_norm, None, snapshot.closeness, None)
        blobs = [None if values is None else packed(values) for values in arrays]
        blobs[2] = snapshot.nonfinite.astype(np.uint8).tobytes()
        blobs[4] = snapshot.closest.astype("<i4").tobytes()
        told = (1, self._done.session, snapshot.step, now, to_json(Moment.of(snapshot)), *blobs)
        self._connection.execute("INSERT OR REPLACE INTO latest VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", told)

    def _thin(self) -> None:
        """Delete the norms of rows that are older than the last 5,000 and are not kept."""
        db, done = self._connection, self._done
        done.since_thinned = 0
        row = db.execute("SELECT id FROM steps ORDER BY id DESC LIMIT 1 OFFSET ?", (LAST,)).fetchone()
        if row is not None:
            db.execute("DELETE FROM norms WHERE id >= ? AND id < ? AND keep = 0", (done.horizon, row[0]))
            done.horizon = row[0]


def _told(path: Path, error: Exception) -> Exception:
    """Return the error to raise if SQLite cannot open a file: an `OSError` if it may be temporary, otherwise a `RunLogError`."""
    if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
        return OSError(str(error))
    return told_of(path, error)
