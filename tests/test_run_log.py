"""The run log: what a training leaves in it, read by gradwatch and by something that knows only the documentation."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import device
from gradwatch.records import Facts, Row, Scalars
from gradwatch.runlog import RunLog
from gradwatch.runlog.batch import Batch
from gradwatch.runlog.store import Store
from gradwatch.runlog.thinning import AROUND, EACH, FIRST, LAST
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from pathlib import Path


def watched(
    folder: Path, steps: int = 300, rate: float = 0.05, state: dict[str, object] | None = None, **settings: object
) -> gradwatch.Monitor:
    """Train a small network with a run log."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    settings = {"report": None, "strict": True, **settings}
    with gradwatch.attach(model, log=folder, **settings) as monitor:  # type: ignore[arg-type]
        if state is not None:
            monitor.load_state_dict(state)
        train(model, optimizer, steps)
    return monitor


@pytest.mark.parametrize("home", ["processor", "device"])
def test_every_row_of_a_training_is_in_its_log(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet rows too, which no Python code sees one by one, and rows that come late: all numbers are the history's."""
    if home == "device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    monitor = watched(tmp_path / "run", steps=700)
    history = monitor.history
    with RunLog(tmp_path / "run") as log:
        series = log.series()
        steps, gradient = log.norms()
        sampled, weight = log.norms(weight=True)
        assert log.layers == history.layers
    assert np.array_equal(series.step, history.steps())
    assert np.array_equal(series.loss, history.loss())
    assert np.array_equal(series.global_norm, history.global_norm())
    assert np.array_equal(series.clip_coefficient, history.clip_coefficient())
    assert not series.skipped.any()
    assert np.array_equal(steps, history.steps())
    assert np.array_equal(gradient, history.grad_norm().astype(np.float32))
    kept = ~np.isnan(history.weight_norm()).all(axis=1)
    assert np.array_equal(sampled, history.steps()[kept])
    assert np.array_equal(weight, history.weight_norm()[kept].astype(np.float32))


@pytest.mark.parametrize("home", ["processor", "device"])
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_the_learning_rate_of_each_step_is_kept(
    home: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a schedule that changes it at each step, also on quiet steps, and where it is a tensor that changes in place."""
    if home == "device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = mlp()
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()], lr=0.05)

    def follow_schedule(step: int) -> None:
        for number, group in enumerate(optimizer.param_groups):
            rate = 0.05 * (1 + number) / (1 + step)
            if kind == "number":
                group["lr"] = rate
            elif step:
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.tensor(rate)

    with gradwatch.attach(model, report=None, log=tmp_path, strict=True) as monitor:
        train(model, optimizer, 300, each=follow_schedule)
    asked = 0.05 * len(optimizer.param_groups) / (1 + np.arange(300))
    with RunLog(tmp_path) as log:
        series = log.series()
    assert np.array_equal(series.learning_rate, monitor.history.learning_rate())
    assert series.learning_rate == pytest.approx(asked, rel=1e-6)
    assert np.isnan(series.loss_scale).all()


@pytest.mark.parametrize("home", ["processor", "device"])
def test_the_loss_scale_of_each_step_is_kept(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the scaler had it when it made the step, also where it grows every few steps."""
    if home == "device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=50)
    x, y = data()
    scales = []
    with gradwatch.attach(model, report=None, log=tmp_path, strict=True):
        for _ in range(180):
            optimizer.zero_grad()
            scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
            scales.append(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    with RunLog(tmp_path) as log:
        assert log.series().loss_scale.tolist() == scales
        assert set(scales) == {2.0**8, 2.0**9, 2.0**10, 2.0**11}
        assert log.series().learning_rate.tolist() == [0.01] * 180


def test_a_log_from_before_rates_were_kept_is_read_and_goes_on(tmp_path: Path) -> None:
    """Its steps have no rate; a resumed run adds what is new, with its rates."""
    monitor = watched(tmp_path / "run", steps=40)
    state = monitor.state_dict()
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "run.sqlite")) as db:
        db.execute("DROP TABLE step_settings")
    with RunLog(tmp_path / "run") as log:
        assert np.isnan(log.series().learning_rate).all()
        assert len(list(log.rows())) == 40
    watched(tmp_path / "run", steps=40, state=state)
    with RunLog(tmp_path / "run") as log:
        rates = log.series().learning_rate
    assert np.isnan(rates[:40]).all()
    assert rates[40:].tolist() == [0.05] * 40


@pytest.mark.parametrize("home", ["processor", "device"])
def test_what_was_said_of_a_run_is_in_its_log(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alarms, incidents with their advice and what auto-clip did, skipped steps, the counts of what is not finite."""
    if home == "device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    monitor = watched(tmp_path / "run", rate=30.0, clip=gradwatch.AutoClip("norm", max_skips=500))
    with RunLog(tmp_path / "run") as log:
        assert repr(log.alarms) == repr(monitor.alarms)
        assert repr(log.incidents) == repr(monitor.incidents)
        assert [incident.advice for incident in log.incidents] == [incident.advice for incident in monitor.incidents]
        assert [str(incident.clip) for incident in log.incidents] == [str(one.clip) for one in monitor.incidents]
        series = log.series()
        assert np.array_equal(series.skipped, monitor.history.skipped())
        assert np.array_equal(series.clip_coefficient, monitor.history.clip_coefficient(), equal_nan=True)
        assert (series.clip_coefficient < 1).any()


def test_what_is_not_finite_is_kept_with_its_place(tmp_path: Path) -> None:
    """The mask and the number of elements of the first non-finite row; NaN comes back as NaN, Inf as Inf."""
    monitor = watched(tmp_path / "run", rate=1e6)
    with RunLog(tmp_path / "run") as log:
        rows = list(log.rows())
    first = next(row for row in rows if row.nonfinite is not None)
    assert first.counts
    for column, (nans, infs) in first.counts.items():
        assert first.nonfinite is not None
        assert first.nonfinite[column] == (nans > 0) + 2 * (infs > 0)
    assert np.array_equal([row.loss for row in rows], monitor.history.loss(), equal_nan=True)
    assert np.array_equal([row.global_norm for row in rows], monitor.history.global_norm(), equal_nan=True)
    assert any(row.nonfinite_weight is not None and row.nonfinite_weight.any() for row in rows)


def test_the_environment_is_in_the_log(tmp_path: Path) -> None:
    """Versions, model, optimizer, and each rule with its thresholds."""
    rules = [rule for rule in gradwatch.default_rules() if rule.code != "GW301"]
    watched(tmp_path / "run", steps=3, rules=rules, clip="norm")
    with RunLog(tmp_path / "run") as log:
        (session,) = log.sessions
        read, unknown = log.rules()
    assert torch.__version__.startswith(
        session.environment["versions"]["torch"]
    )  # which may add the build: 2.15.0+cu132
    assert session.environment["clip"].startswith("AutoClip(clip=ClipNorm(max_norm=1.0)")
    assert (session.facts.model, session.facts.optimizer, session.facts.rate) == ("Sequential", "SGD", 0.05)
    assert (read, unknown) == (rules, [])
    assert session.ended is not None
    assert session.ended >= session.started


def test_logging_changes_nothing(tmp_path: Path) -> None:
    """Losses and parameters are those of the unwatched run, to the bit."""
    plain = mlp()
    losses = train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), 200)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path, strict=True):
        assert train(model, optimizer, 200) == losses
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_can_be_read_with_nothing_but_its_documentation(tmp_path: Path) -> None:
    """As any language with SQLite would: little-endian float32, one for each layer."""
    monitor = watched(tmp_path / "run", steps=40)
    db = sqlite3.connect(tmp_path / "run" / "run.sqlite")
    names = [name for (name,) in db.execute("SELECT name FROM layers ORDER BY place")]
    assert tuple(names) == monitor.history.layers
    for step, loss, blob in db.execute("SELECT step, loss, gradient FROM line JOIN norms USING (id) ORDER BY id"):
        numbers = struct.unpack(f"<{len(names)}f", blob)
        assert numbers == pytest.approx(monitor.history.grad_norm()[step], rel=1e-6)
        assert loss == monitor.history.loss()[step]
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_a_log_is_read_while_it_is_written(tmp_path: Path) -> None:
    """By a reader that was opened early, and grows with the run."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path, strict=True) as monitor:
        train(model, optimizer, 100)
        assert monitor.flush()
        with RunLog(tmp_path) as log:
            before = log.series()
            assert log.is_written
            train(model, optimizer, 100)
            assert monitor.flush()
            after = log.series(since=int(before.id[-1]))
    assert len(before.step) == 100
    assert after.step.tolist() == list(range(100, 200))
    with RunLog(tmp_path) as log:
        assert not log.is_written


def test_a_reader_in_the_same_process_takes_no_lock_from_the_writer(tmp_path: Path) -> None:
    """Else the next process that closes the file would take the write-ahead log away from under the training."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    other = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT * FROM steps').fetchall(); db.close()"
    with gradwatch.attach(model, report=None, log=tmp_path, strict=True) as monitor:
        train(model, optimizer, 50)
        assert monitor.flush()
        RunLog(tmp_path).close()
        subprocess.run([sys.executable, "-c", other, str(tmp_path / "run.sqlite")], check=True, timeout=60)
        assert (tmp_path / "run.sqlite-wal").stat().st_size
        train(model, optimizer, 50)
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == list(range(100))
        assert log._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_resumed_run_goes_on_in_its_log(tmp_path: Path) -> None:
    """From the step of the checkpoint on; what was made again is not part of the run any more, and still there."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path) as monitor:
        train(model, optimizer, 100)
        state = monitor.state_dict()
        train(model, optimizer, 50)
    watched(tmp_path, steps=70, state=state)
    with RunLog(tmp_path) as log:
        first, second = log.sessions
        assert (first.first_step, first.until_step, second.first_step, second.until_step) == (0, 100, 100, None)
        assert log.series().step.tolist() == list(range(170))
        assert len(list(log.rows())) == 170
        assert log._db.execute("SELECT count(*) FROM steps").fetchone() == (220,)


def test_layers_that_come_later_get_their_place(tmp_path: Path) -> None:
    """The rows before them lack their numbers."""
    model = mlp()
    with gradwatch.attach(model, report=None, log=tmp_path, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
        model.append(torch.nn.Linear(1, 1))
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
    with RunLog(tmp_path) as log:
        assert log.layers == monitor.history.layers
        _, norms = log.norms()
    assert np.isnan(norms[:20, -2:]).all()
    assert np.array_equal(norms, monitor.history.grad_norm().astype(np.float32), equal_nan=True)


def test_of_processes_that_train_together_the_first_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others leave nothing."""
    monkeypatch.setenv("RANK", "1")
    watched(tmp_path / "run", steps=3)
    assert not (tmp_path / "run").exists()


def filled(folder: Path, rows: int, layers: int, incident: gradwatch.Incident | None = None) -> Path:
    """Write a log of this size as a quiet training would, faster."""
    store = Store(folder, [(f"blocks.{n}.weight", 100, 1, 10) for n in range(layers)], {}, Facts())
    random = np.random.default_rng(0)
    for start in range(0, rows, 32):
        norms = random.random((32, layers))
        sampled = Row(start + 31, 1.0, norms[-1], 1.0, weight_norm=norms[-1])
        batch = Batch(
            time=float(start),
            scalars=Scalars(
                step=np.arange(start, start + 32),
                loss=random.random(32),
                global_norm=random.random(32),
                clip_coefficient=np.ones(32),
                skipped=np.zeros(32, dtype=bool),
                learning_rate=np.full(32, 0.1),
                loss_scale=np.full(32, np.nan),
            ),
            gradient=norms.astype(np.float32),
            special=[(31, sampled)],
        )
        store.write([batch])
        if incident is not None and start == incident.opened_step:
            store._incidents([incident])
    store.close(ended=True)
    return folder / "run.sqlite"


def test_a_long_run_keeps_all_numbers_where_they_matter(tmp_path: Path) -> None:
    """At the start, around an incident and at the end; each eighth row elsewhere, among them all with weights."""
    incident = gradwatch.Incident("exploding", "critical", "confirmed", opened_step=3200)
    filled(tmp_path, 12_800, 3, incident)
    with RunLog(tmp_path) as log:
        steps = log.norms()[0]
        weights = log.norms(weight=True)[0]
        assert len(log.series().step) == 12_800
    kept = np.zeros(12_800, dtype=bool)
    kept[steps] = True
    assert kept[:FIRST].all()
    assert kept[3200 - AROUND : 3200 + AROUND].all()
    assert kept[-LAST:].all()
    between = np.arange(4000, 7000)
    assert np.array_equal(between[kept[between]], between[(between + 1) % EACH == 0])
    assert weights.tolist() == list(range(31, 12_800, 32))


def test_a_million_steps_of_300_layers_stay_below_a_gigabyte(tmp_path: Path) -> None:
    """By what 20,000 rows add to a log that is being thinned already; `benchmarks.run_log` writes the whole million."""
    small = filled(tmp_path / "a", 12_800, 300).stat().st_size
    large = filled(tmp_path / "b", 32_000, 300).stat().st_size
    each = (large - small) / (32_000 - 12_800)
    assert small + each * (1_000_000 - 12_800) < 1e9
    assert math.isclose(each, 250, rel_tol=0.5)  # bytes a row
