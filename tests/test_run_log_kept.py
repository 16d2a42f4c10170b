"""What stays in a run log whatever happens beside it: pauses and kills, texts that no file holds, errors, steps made again."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.errors import RunLogError
from gradwatch.records import Facts, Scalars
from gradwatch.runlog import RunLog
from gradwatch.runlog.batch import Batch
from gradwatch.runlog.recording import Recording
from gradwatch.runlog.schema import FILE
from gradwatch.runlog.store import Store
from gradwatch.runlog.writer import Writer
from tests.test_run_log import watched
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.history.history import History

ROOT = Path(__file__).parent.parent
PAUSE = 1.0  # seconds after which a row is in the file


def assert_same(folder: Path, history: History) -> None:
    """Assert that a log holds the rows of a history, all their numbers."""
    with RunLog(folder) as log:
        series, (steps, norms) = log.series(), log.norms()
    assert np.array_equal(series.step, history.steps())
    assert np.array_equal(steps, history.steps())
    for name in ("loss", "global_norm", "clip_coefficient", "skipped"):
        assert np.array_equal(getattr(series, name), getattr(history, name)(), equal_nan=name != "skipped"), name
    assert np.array_equal(norms, history.grad_norm().astype(np.float32), equal_nan=True)


# Pauses and kills.


@pytest.mark.parametrize("clip", [None, gradwatch.AutoClip(gradwatch.ClipNorm(0.01), when="always")], ids=["", "clip"])
def test_a_training_that_rests_has_its_rows_in_the_file(clip: Any, tmp_path: Path) -> None:
    """Without another step: in a validation or at a breakpoint; what comes afterwards is as if it had not rested."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path, clip=clip, strict=True) as monitor:
        for steps in (200, 37):
            train(model, optimizer, steps)
            time.sleep(PAUSE)
            assert_same(tmp_path, monitor.history)
        train(model, optimizer, 100)
    assert_same(tmp_path, monitor.history)
    with RunLog(tmp_path) as log:
        provenances = {row.provenance for row in log.rows()}
    assert provenances == {monitor.history.row.provenance}


def test_a_training_killed_while_it_rests_keeps_all_its_rows(tmp_path: Path) -> None:
    """With SIGKILL, in a process of its own."""
    program = f"""
import os, signal, sys, time, torch, gradwatch
from tests.trainings import mlp, train
torch.set_num_threads(1)
model = mlp()
gradwatch.attach(model, report=None, log=sys.argv[1])
train(model, torch.optim.SGD(model.parameters(), lr=0.05), 200)
time.sleep({PAUSE})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == list(range(200))


class Slow(gradwatch.Rule):
    """A rule that takes its time over one step: that row is in the history, and what is done about it is not known yet."""

    code: ClassVar[str] = "MY001"
    name: ClassVar[str] = "slow"
    sign: ClassVar[Any] = "subtle"
    kind: ClassVar[Any] = "stalled"
    per_layer: ClassVar[bool] = False
    limit: float = 1.0

    def measure(self, history: Any) -> Any:
        """See `gradwatch.Rule`."""
        if history.row.step == 40:
            time.sleep(PAUSE)
        return np.zeros(1)


def test_a_row_that_is_still_judged_ends_as_it_was(tmp_path: Path) -> None:
    """What is written ahead of a decision makes way for what came of it."""
    model = mlp()
    clip = gradwatch.AutoClip(gradwatch.ClipNorm(0.01), when="always")
    with gradwatch.attach(model, report=None, log=tmp_path, clip=clip, rules=[Slow()], strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 60)
    assert (monitor.history.clip_coefficient() < 1).all()
    assert_same(tmp_path, monitor.history)


# Texts.


class UnprintableError(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("cannot decode cat\udcff.jpg"), r"cat\udcff.jpg"),
        (UnprintableError(), "UnprintableError, whose message cannot be"),
    ],
    ids=["no unicode", "no text"],
)
def test_an_error_of_any_text_costs_no_row(error: Exception, said: str, tmp_path: Path) -> None:
    """The name of a file that is no UTF-8, an error that fails to say what it is: the last moment is kept with all rows."""
    model = mlp()
    monitor = gradwatch.attach(model, report=None, log=tmp_path, strict=True)

    def fail(step: int) -> None:
        if step == 299:
            raise error

    with pytest.raises(type(error)), monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 300, each=fail)
    assert_same(tmp_path, monitor.history)
    with RunLog(tmp_path) as log:
        ((_, reason, record),) = log.flights
        assert log.sessions[-1].ended is not None
    assert said in reason
    assert said in record["traceback"] or isinstance(error, UnprintableError)


def test_text_that_is_no_unicode_is_kept_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In names of layers, batches and programs, and in notes; the log is resumed, and every command reads it."""
    monkeypatch.setattr(sys, "argv", ["train\udcff.py"])
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential()
        model._modules["block\udcff\x00"] = nn.Linear(8, 1)
        with gradwatch.attach(model, report=None, log=tmp_path, strict=True) as monitor:
            monitor.note("cannot read \udcfe")
            monitor.batch({"x\udcff": torch.zeros(2)})
            train(model, torch.optim.SGD(model.parameters(), lr=1e6), 40)
    with RunLog(tmp_path) as log:
        assert log.layers[0] == "block\\udcff\x00.weight"
        assert log.incidents[0].suspect in log.layers
        assert "cannot read \\udcfe" in log.notes
        assert log.flights[0][2]["batch"][0]["name"] == "x\\udcff"
        assert log.sessions[0].environment["program"] == "train\\udcff.py"
        assert log.series().step.tolist() == list(range(40))
    capsys.readouterr()
    for command in (["report", "--json"], ["report"], ["replay"], ["export", "--to", "csv"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 0, capsys.readouterr().err


def test_a_folder_of_any_name_holds_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are no UTF-8, and the signs that mean something in a URI."""
    folder = tmp_path / os.fsdecode(b"a?b#c%20\xff")
    watched(folder, steps=5)
    with RunLog(folder) as log:
        assert len(log.series().step) == 5
    assert main(["report", str(folder)]) == 0
    assert "\\udcff:ended" in "".join(capsys.readouterr().out.split())  # the line is wrapped anywhere in a long path


def batch_of(start: int, **more: Any) -> Batch:
    """Return 32 rows of one layer."""
    numbers = np.ones(32)
    steps = np.arange(start, start + 32)
    return Batch(
        0.0,
        Scalars(steps, numbers, numbers, numbers, numbers < 0, numbers, numbers),
        np.ones((32, 1), np.float32),
        **more,
    )


def test_what_no_file_takes_costs_itself_and_not_the_rows(tmp_path: Path) -> None:
    """A number that SQLite does not know in a note: the rows before it, beside it and after it are kept, and it is said once."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        raise RuntimeError("nor does it matter whether somebody listens")

    writer = Writer(Store(tmp_path, [("w", 1, 0, 1)], {}, Facts()), tell)
    writer.start()
    for start in range(0, 320, 32):
        notes = [(2**70 if start in (64, 128) else start, "a note")]
        writer.put(batch_of(start, notes=notes))
    assert writer.flush(10.0)
    writer.put(batch_of(320))
    writer.close(10.0)
    assert len(told) == 1
    assert "which continues without it: OverflowError" in told[0]
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == list(range(352))
        assert log.sessions[-1].ended is not None
    with sqlite3.connect(tmp_path / FILE) as db:
        assert db.execute("SELECT count(*) FROM notes").fetchone() == (8,)
    db.close()


# Errors.


@pytest.mark.parametrize("part", ["row", "judged", "step", "_batch_of", "start", "close"])
def test_a_log_that_fails_gives_back_thread_file_and_lock_at_once(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the training goes on: another monitor may write it, and where it can it says that it ends here."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("any error in the log's part")

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "run log" in thread.name]

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if part == "start":
        monkeypatch.setattr(Recording, part, fails)
    with gradwatch.attach(model, report=None, log=tmp_path) as monitor:
        train(model, optimizer, 50)
        monkeypatch.setattr(Recording, part, fails)
        train(model, torch.optim.SGD(model.parameters(), lr=1e6), 10)
        monitor.flush()
        if part != "close":
            assert threads() == []
            monkeypatch.undo()
            gradwatch.attach(mlp(), report=None, log=tmp_path).detach()
        assert len(train(model, optimizer, 20)) == 20
    assert threads() == []
    monkeypatch.undo()
    gradwatch.attach(mlp(), report=None, log=tmp_path).detach()
    with RunLog(tmp_path) as log:
        steps = log.series().step.tolist()
        assert steps == list(range(len(steps)))
        assert len(steps) >= {"start": 0, "_batch_of": 1}.get(part, 32)
        assert any("this log ends here" in note for note in log.notes) == (part not in ("start", "_batch_of"))


def test_standard_error_that_is_closed_ends_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `python train.py 2>&1 | head`: an incident that cannot be told is kept all the same."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    monitor = watched(tmp_path, rate=1e6, strict=False)
    assert_same(tmp_path, monitor.history)
    with RunLog(tmp_path) as log:
        assert log.flights


# Steps that are made again.


def test_a_run_that_goes_back_is_one_truthful_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process, twice: each step as it was made last; the rows that are gone stay in the tables, incidents are one."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wild = torch.optim.SGD(model.parameters(), lr=1e4)
    made: dict[int, float] = {}

    def steps(first: int, count: int, by: torch.optim.Optimizer = optimizer) -> None:
        losses = train(model, by, count, seed=first + len(made))
        made.update(zip(range(first, first + count), losses, strict=True))

    with gradwatch.attach(model, report=None, log=tmp_path / "run") as monitor:
        steps(0, 100)
        state, weights = monitor.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
        steps(100, 30)
        steps(130, 20, wild)
        for back, count in ((100, 40), (100, 25)):
            for step in [step for step in made if step >= back]:
                del made[step]
            monitor.load_state_dict(state)
            model.load_state_dict(weights)
            steps(back, count)
            time.sleep(PAUSE)
            with RunLog(tmp_path / "run") as log:
                assert dict(zip(log.series().step.tolist(), log.series().loss.tolist(), strict=True)) == made
        steps(125, 60)
    with RunLog(tmp_path / "run") as log:
        series = log.series()
        assert series.step.tolist() == list(range(185))
        assert series.loss.tolist() == pytest.approx([made[step] for step in range(185)], rel=1e-6)
        assert [row.step for row in log.rows()] == list(range(185))
        assert log.norms()[0].tolist() == list(range(185))
        assert log.end()[:2] == (184, 185)
        assert [(one.first_step, one.until_step) for one in log.sessions] == [(0, 100), (100, 100), (100, None)]
        assert [one.opened_step for one in log.incidents] == [one.opened_step for one in monitor.incidents]
        assert monitor.incidents
        assert log._db.execute("SELECT count(*) FROM steps").fetchone() == (100 + 50 + 40 + 85,)
        times = log.times(series.id)
        assert (np.diff(times) >= 0).all()
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 185
    assert main(["export", str(tmp_path / "run"), "--to", "csv", "--out", str(tmp_path / "out")]) == 0
    rows = (tmp_path / "out" / "steps.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[1]) for row in rows] == series.loss.tolist()


def test_rows_under_way_on_a_device_are_not_of_the_steps_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come late keep the numbers of the steps that they were made at."""
    from gradwatch import device

    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path) as monitor:
        train(model, optimizer, 100)
        state = monitor.state_dict()
        train(model, optimizer, 50)
        monitor.load_state_dict(state)
        train(model, optimizer, 20)
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == list(range(120))
        assert log._db.execute("SELECT count(*) FROM steps").fetchone() == (170,)


# Files of others.


def put(path: Path, kind: str, precious: Path) -> None:
    """Put something at ``path`` that a run log did not make."""
    makers: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("data of another program"),
        "link": lambda: path.symlink_to(precious),
        "dangling link": lambda: path.symlink_to(precious.parent / "nothing"),
        "hard link": lambda: path.hardlink_to(precious),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    makers[kind]()


@pytest.mark.parametrize("kind", ["text", "link", "dangling link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["writer.lock", FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal"])
def test_a_file_of_another_program_is_refused_and_left_alone(name: str, kind: str, tmp_path: Path) -> None:
    """Whatever it is called and whatever it is: no byte changes, nothing is made where a link leads, nothing is waited for."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    precious.write_text("" if kind == "hard link" else "data of another program")
    put(run / name, kind, precious)
    before = (run / name).lstat()
    model = mlp()
    with pytest.raises(RunLogError, match=r"another program|regular file|hard link|not a run log"):
        gradwatch.attach(model, report=None, log=run)
    after = (run / name).lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert precious.read_text() == ("" if kind == "hard link" else "data of another program")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]
    if name != FILE or kind != "text":
        assert main(["list", str(tmp_path)]) == 0
    (run / name).rmdir() if kind == "folder" else (run / name).unlink()
    watched(run, steps=3)


def test_a_foreign_database_is_left_alone_to_the_byte(tmp_path: Path) -> None:
    """Also one with a write-ahead log that its program has not put away."""
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as songs:
        songs.execute("PRAGMA journal_mode = WAL")
        songs.execute("CREATE TABLE songs (name TEXT)")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith("-shm")}
        assert len(before) == 2
        with pytest.raises(RunLogError, match="of another program"):
            gradwatch.attach(mlp(), report=None, log=tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    songs.close()


def test_a_cell_that_makes_model_and_log_anew_can_be_run_again(tmp_path: Path) -> None:
    """Also where the model refers to itself, so that only the collector can free it."""
    for _ in range(3):
        model = mlp()
        model.itself = [model]  # type: ignore[assignment]
        gradwatch.attach(model, report=None, log=tmp_path)
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 5)
        del model
    gc.collect()


def test_a_schema_that_is_no_text_is_told_as_damage(tmp_path: Path) -> None:
    """And the monitor that was there goes on."""
    model = mlp()
    gradwatch.attach(model, report=None, log=tmp_path / "run").detach()
    file = tmp_path / "run" / FILE
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(b"-- from 0", damaged.index(b"CREATE TABLE layers")) + 4] = 0xCD
    file.write_bytes(damaged)
    with gradwatch.attach(model, report=None) as monitor:
        with pytest.raises(RunLogError, match="is damaged"):
            gradwatch.attach(model, report=None, log=tmp_path / "run")
        assert gradwatch.monitor_of(model) is monitor


@pytest.mark.parametrize("notebook", [True, False])
def test_a_notebook_that_holds_the_old_model_writes_the_log_anew(
    notebook: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an interrupt, whose traceback is kept: the old monitor ends, and that is said. In a program it is a mistake.

    Also in one that has imported IPython as a library.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("IPython")
    if notebook:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    old, new = mlp(), mlp()
    for model in (old, new):
        next(model.parameters()).requires_grad_(False)
    with gradwatch.attach(old, report=None, log=tmp_path) as first:
        train(old, torch.optim.SGD(old.parameters(), lr=0.05), 3)
        if notebook:
            second = gradwatch.attach(new, report=None, log=tmp_path)
            assert not first.attached
            assert second.notes == [
                "an earlier Sequential with the same layers and run log was still watched, for 3 steps: "
                f"that monitor is detached, its run log {tmp_path} ended."
            ]
            second.detach()
        else:
            with pytest.raises(RunLogError, match="another monitor of this process"):
                gradwatch.attach(new, report=None, log=tmp_path)
            assert first.attached
