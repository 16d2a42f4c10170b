"""What is kept in the moment in which a run goes wrong, and what keeps a broken model from being saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.measure.batch_statistics import numbers_of
from gradwatch.runlog import RunLog
from tests.trainings import data, mlp, train

ROOT = Path(__file__).parent.parent


def test_a_critical_incident_is_on_the_disk_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the very step, with rows, incident, versions and the batch that was handed over; the path is printed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    with gradwatch.attach(model, report=None, log=tmp_path / "run", strict=True) as monitor:
        for step in range(60):
            broken = x.clone()
            if step == 40:
                broken[3, 2] = float("nan")
                broken[5, :2] = float("inf")
            inputs = monitor.batch({"x": broken, "y": y})
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs["x"]), inputs["y"]).backward()
            optimizer.step()
            if step == 40:
                with RunLog(tmp_path / "run") as log:  # the training has not gone on yet
                    ((at, reason, record),) = log.flights
                    assert log.end()[0] == 40
    assert at == 40
    assert "nonfinite" in reason
    assert "(critical)" in reason
    assert [row["step"] for row in record["rows"]] == list(range(41))
    assert record["rows"][-1]["loss"] == "nan"
    assert record["incidents"][0]["severity"] == "critical"
    assert record["versions"]["torch"] == torch.__version__
    told = {one["name"]: one for one in record["batch"]}
    assert (told["x"]["nan"], told["x"]["inf"], told["x"]["shape"]) == (1, 2, [256, 8])
    assert told["y"]["mean"] == pytest.approx(y.mean().item(), rel=1e-5)
    said = capfd.readouterr().err
    assert said.count(f"kept: gradwatch report {tmp_path / 'run'}") == 1
    assert reason in said


def test_a_training_that_raises_leaves_its_last_moment(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the traceback; the error goes on its way."""

    def fail(step: int) -> None:
        if step == 25:
            raise ZeroDivisionError("of the user's own")

    model = mlp()
    with (
        pytest.raises(ZeroDivisionError, match="of the user's own"),
        gradwatch.attach(model, report=None, log=tmp_path, strict=True),
    ):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 60, each=fail)
    with RunLog(tmp_path) as log:
        ((step, reason, record),) = log.flights
    assert (step, reason) == (24, "training raised ZeroDivisionError: of the user's own")
    assert record["traceback"].rstrip().endswith("ZeroDivisionError: of the user's own")
    assert record["batch"] is None
    assert "kept: gradwatch report" in capfd.readouterr().err


def test_a_program_that_ends_with_an_error_leaves_its_last_moment_too(tmp_path: Path) -> None:
    """Without a `with`: the error that ended the program is known at its exit. Its end by `sys.exit` is none."""
    program = """
import os, sys, torch, gradwatch
from tests.trainings import mlp, train
child = os.fork()  # one import of torch for two programs
ending = "error" if child else "exit"
model = mlp()
gradwatch.attach(model, report=None, log=f"{sys.argv[1]}/{ending}")
train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
if ending == "exit":
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
model(torch.zeros(3))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: mat1 and mat2" in done.stderr.splitlines()[-1]
    for ending in ("exit", "error"):
        with RunLog(tmp_path / ending) as log:
            reasons = [reason for _, reason, _ in log.flights]
        assert bool(reasons) == (ending == "error")
        assert all(reason.startswith("training raised RuntimeError: mat1 and mat2") for reason in reasons)


def test_the_numbers_of_a_batch_are_those_of_torch() -> None:
    """Of its finite elements, in whatever it is packed; what is no tensor is left out."""
    x = torch.tensor([[1.0, float("nan")], [3.0, float("-inf")]])
    (first, second, empty) = numbers_of({"a": [x, "text", None], "b": (torch.arange(4), torch.zeros(0))})
    assert first == {
        "name": "a[0]",
        "shape": [2, 2],
        "type": "float32",
        "smallest": 1.0,
        "largest": 3.0,
        "mean": 2.0,
        "deviation": 1.0,
        "nan": 1,
        "inf": 1,
    }
    assert (second["name"], second["mean"], second["type"]) == ("b[0]", 1.5, "int64")
    assert (empty["mean"], empty["nan"]) == (None, 0)


def test_a_batch_is_returned_unchanged_and_let_go(tmp_path: Path) -> None:
    """It is held until the next one, or the end."""
    import weakref

    model = mlp()
    with gradwatch.attach(model, report=None, log=tmp_path) as monitor:
        batch = torch.zeros(3)
        assert monitor.batch(batch) is batch
        ref = weakref.ref(batch)
        del batch
        assert ref() is not None
    assert ref() is None


def test_a_guarded_checkpoint_is_never_a_broken_one() -> None:
    """Saved at each step where the guard allows it: all parameters of the last one saved are finite, and it was saved late."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = data()
    saved, at = {}, -1
    with gradwatch.attach(model, report=None) as monitor:
        for step in range(120):
            if step == 80:
                optimizer.param_groups[0]["lr"] = 1e4
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if monitor.checkpoint_guard():
                saved, at = {name: value.clone() for name, value in model.state_dict().items()}, step
        assert not monitor.checkpoint_guard()
    assert 78 <= at <= 81
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("place", ["parameter", "buffer"])
def test_the_guard_looks_at_what_would_be_saved(place: str) -> None:
    """A value that is not finite, of a parameter or a buffer, that no step has seen; large ones are well."""
    linear, norm = nn.Linear(8, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(linear, norm)
    assert norm.running_var is not None
    with gradwatch.attach(model, report=None) as monitor:
        assert monitor.checkpoint_guard()
        with torch.no_grad():
            linear.weight[0, :2] = 3e38
            assert monitor.checkpoint_guard()
            (linear.weight[0] if place == "parameter" else norm.running_var)[0] = float("inf")
        assert not monitor.checkpoint_guard()
