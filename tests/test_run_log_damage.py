"""Damaged and forged run logs: whatever a file holds, each command says in one line that it cannot be read, or reads it."""

from __future__ import annotations

import contextlib
import io
import shutil
import sqlite3
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.commands.watch import _look
from gradwatch.page.content import content_of
from gradwatch.reports.watching import Watching
from gradwatch.runlog import RunLog
from gradwatch.runlog.schema import FILE
from tests.test_foreign_text import drawn
from tests.test_run_log import watched
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = (
    ("report", "RUN", "--check"),
    ("report", "RUN", "--json"),
    ("report", "RUN", "--html", "OUT/page.html"),
    ("list", "RUNS"),
    ("list", "RUNS", "--json"),
    ("compare", "RUN", "GOOD"),
    ("compare", "GOOD", "RUN", "--json"),
    ("replay", "RUN"),
    ("suggest", "RUN"),
    ("export", "RUN", "--to", "csv", "--out", "OUT/csv"),
)
VALUES = (
    "NULL",
    "'x'",
    "''",
    "x'00ff'",
    "x''",
    "CAST(x'c328' AS TEXT)",
    "-1",
    "0",
    "9223372036854775807",
    "1e300",
    "9e999",
    "'nan'",
    "'{}'",
    "'[]'",
    "'null'",
    "zeroblob(5000)",
    f"'{'[' * 5000}'",
    f'\'{{"rules": [{{"code": {"9" * 5000}}}]}}\'',
    '\'{"rules": [1], "versions": {"torch": 3}}\'',
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that explodes, and one that is well."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stderr(io.StringIO()):
        watched(folder / "run", rate=1e6, steps=40, clip=gradwatch.AutoClip("norm", max_skips=500))
    watched(folder / "good", steps=40)
    return folder


class Bench:
    """Where logs are damaged and tried: `damage` begins with a whole one each time."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.file = folder / "runs" / "run" / FILE
        self._tried = 0
        self._whole, self._folder = whole, folder
        shutil.copytree(whole, folder / "runs")

    def damage(self, statement: str) -> bool:
        """Damage the log by a statement of SQL; False when SQLite does not let it happen, or nothing was changed."""
        shutil.copyfile(self._whole / "run" / FILE, self.file)
        db = sqlite3.connect(self.file)
        try:
            with contextlib.suppress(sqlite3.Error):
                db.executescript(statement)
            return db.total_changes > 0 or "DROP" in statement
        finally:
            db.close()

    def said_by(self, command: tuple[str, ...]) -> tuple[int, str]:
        """Run a command on it; return its exit code and what stood on standard error."""
        runs = self._folder / "runs"
        places = {"RUN": runs / "run", "RUNS": runs, "GOOD": runs / "good"}
        typed = [str(places.get(word, word)).replace("OUT", str(self._folder / "out")) for word in command]
        out, err = io.StringIO(), io.StringIO()
        (self._folder / "out").mkdir(exist_ok=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(typed)
        if command[0] == "list":
            assert "good" in out.getvalue()
            assert code == 0
        return code, err.getvalue()

    def try_all(self) -> list[int]:
        """Assert that each command answers in words; return the exit codes."""
        codes, self._tried = [], self._tried + 1
        for command in COMMANDS:
            if "--html" in command and self._tried % 4 != 1:  # it takes as long as all the others
                continue
            code, err = self.said_by(command)
            codes.append(code)
            assert code in ((0, 1, 2) if "--check" in command else (0, 2)), command
            assert (code == 2) == err.startswith("gradwatch: "), (command, err)
            assert err.count("\n") == (code == 2), (command, err)
        watching = Watching()
        _look(self.file.parent, watching)
        for key in "lngi":
            drawn(watching.picture(80, 24), 80)
            watching.key(key)
        return codes


@pytest.fixture
def bench(whole: Path, tmp_path: Path) -> Bench:
    """See `Bench`."""
    return Bench(whole, tmp_path)


def columns(folder: Path) -> list[tuple[str, str]]:
    """Return table and column of all that a log holds."""
    db = sqlite3.connect(folder / "run" / FILE)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = [(table, row[1]) for table in tables for row in db.execute(f"PRAGMA table_info({table})")]
    db.close()
    return found


def test_whatever_stands_in_a_column_is_answered_in_words(bench: Bench, whole: Path) -> None:
    """A value of a wrong kind or size in one row or in all, in any column of any table, drawn by lot; and the whole log."""
    shutil.copyfile(whole / "run" / FILE, bench.file)
    assert 2 not in bench.try_all()
    cases = [
        f"UPDATE {table} SET {column} = {value} {where}"  # noqa: S608  names of the schema
        for table, column in columns(whole)
        for value in VALUES
        for where in ("", f"WHERE rowid = (SELECT max(rowid) FROM {table})" if table != "incidents" else "")  # noqa: S608
    ]
    random = np.random.default_rng(0)
    tried = refused = 0
    for place in random.permutation(len(cases)):
        if tried == 30:
            break
        if bench.damage(cases[place]):
            tried += 1
            refused += 2 in bench.try_all()
    assert tried == 30
    assert refused > 8


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM steps",
        "UPDATE steps SET id = -id; UPDATE norms SET id = -id",
        "UPDATE steps SET id = id + 999999999000 WHERE id % 1000000000000 > 20",
        "UPDATE layers SET name = 'same'",
        "UPDATE incidents SET incident = replace(incident, '.weight', '.nothing')",
        "UPDATE incidents SET incident = replace(incident, 'opened_step\": ', 'opened_step\": -9')",
        "UPDATE incidents SET incident = replace(incident, 'opened_step\": ', 'opened_step\": 9999999999999')",
        "DELETE FROM layers",
        "DELETE FROM sessions",
        "DELETE FROM norms",
        "DELETE FROM latest",
        "DELETE FROM provenances",
        "DROP TABLE norms",
        "DROP TABLE clock",
        "DROP VIEW line",
        "DROP VIEW line; CREATE VIEW line AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id, 1 AS "
        "session, id AS step, 1 AS loss, 1 AS global_norm, 1 AS clip_coefficient, 0 AS skipped, 1 AS provenance FROM n",
        "INSERT INTO notes VALUES (1, 1, x'00ff')",
        "UPDATE sessions SET started = 'x'",
        "UPDATE layers SET place = place + 1000000",
        "UPDATE norms SET gradient = substr(gradient, 1, 7)",
        "UPDATE norms SET gradient = gradient || gradient",
        "UPDATE latest SET moment = replace(moment, 'confirmed', 'splendid')",
        "UPDATE latest SET moment = '{}'",
        "UPDATE incidents SET incident = replace(incident, 'critical', 'grave')",
        "UPDATE incidents SET incident = replace(incident, '\"number\"', '\"opened_step\"')",
        "INSERT INTO layers WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 80000) "
        "SELECT i, 'x', 1, 1, 1 FROM n; INSERT INTO steps WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n "
        "WHERE i < 30000) SELECT 1000000000000 + i, 1, 1, 1, 0, 1 FROM n; INSERT INTO norms SELECT id, 0, x'', x'' FROM steps "
        "WHERE id > 1000000000099",
    ],
    ids=lambda statement: statement[:40].lower().replace(" ", "_"),
)
def test_what_is_missing_or_made_up_is_answered_in_words(statement: str, bench: Bench) -> None:
    """Rows and tables that are not there, views that never end, sizes beyond all memory: quickly, and without a traceback."""
    assert bench.damage(statement)
    codes = bench.try_all()
    assert 0 in codes  # `list`, which shows the others


SESSIONS = (
    "INSERT INTO sessions SELECT n, pid, host, started, ended, 0, NULL, environment, facts, backward_order "
    "FROM sessions, (SELECT 2 AS n UNION SELECT 3 UNION SELECT 4); "
)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {} SET id = 1000000000000 * (4 - id % 1000000000000 / 10) + id % 1000000000000; ",
        "INSERT INTO {0} SELECT * FROM (SELECT id + 1000000000000, {1} FROM {0}); ",
    ],
    ids=["backwards", "again"],
)
def test_steps_that_do_not_ascend_are_reported_all_the_same(statement: str, bench: Bench) -> None:
    """By each command; the page draws each row at its step."""
    rest = {"steps": "loss, global_norm, clip_coefficient, skipped, provenance", "norms": "keep, gradient, weight"}
    assert bench.damage(SESSIONS + "".join(statement.format(table, rest[table]) for table in rest))
    with RunLog(bench.file) as log:
        assert (np.diff(log.series().step) < 0).any()
        page = content_of(log)
    assert page["global_norm"]["x"] == sorted(page["global_norm"]["x"])
    assert set(page["global_norm"]["x"]) == set(range(40))
    assert page["step"] == 39
    assert set(bench.try_all()) <= {0, 1}


def test_bytes_of_chance_are_answered_in_words(bench: Bench, whole: Path) -> None:
    """A file that was cut off, or overwritten in places."""
    healthy = (whole / "run" / FILE).read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for trial in range(8):
        damaged = bytearray(healthy)
        if trial % 4 == 0:
            del damaged[int(random.integers(0, len(healthy))) :]
        else:
            place = int(random.integers(16 if trial % 4 == 1 else 8192, len(healthy) - 2000))
            damaged[place : place + 1000] = random.bytes(1000)
        bench.file.write_bytes(damaged)
        refused += 2 in bench.try_all()
    assert refused  # which bytes are hit depends on the size of the log


@pytest.mark.parametrize(
    "text",
    [
        "gradient w 1x99999999999",
        "gradient w 1x9999999999999999999999",
        "loss 1",
        "gradient \x1b[2J 1x5 x",
        "gradient w 1*2",
        "\x1b[2J 1",
        "rate -1",
        "elements 0",
        "gradient w 1.2.3",
        "gradient w nan inf",
    ],
)
def test_a_trace_that_is_none_is_answered_in_words(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the number of its line; a series without end is not begun."""
    (tmp_path / "trace.txt").write_text(text)
    code = main(["replay", str(tmp_path / "trace.txt")])
    said = capsys.readouterr()
    assert (code == 2) == said.err.startswith("gradwatch: ")
    assert said.err.count("\n") == (code == 2)
    assert "\x1b" not in said.out + said.err


def test_a_layer_may_be_called_as_a_column_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export has a column for each layer, the steps beside it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.ones(8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.step

    model = Model()
    with gradwatch.attach(model, report=None, log=tmp_path / "run"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 10)
    for kind in ("csv", "parquet"):
        assert main(["export", str(tmp_path / "run"), "--to", kind]) == 0
    capsys.readouterr()
    rows = (tmp_path / "run" / "csv" / "gradient_norms.csv").read_text().splitlines()
    assert rows[0] == "step,step"
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(10))


def test_a_log_of_a_model_that_has_changed_since_is_read(tmp_path: Path) -> None:
    """No damage: layers that came later are missing in older rows, and each command reads it."""
    model = mlp()
    with gradwatch.attach(model, report=None, log=tmp_path / "run"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
        model.append(nn.Linear(1, 1))
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    bench = Bench(tmp_path, tmp_path / "bench")
    assert set(bench.try_all()) == {0}
