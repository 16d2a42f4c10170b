"""Reports for the loggers that users already have, read back with the real libraries, offline."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.errors import UsageError
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.reports import Report

# neither shall call home from a test; both read this when they are imported
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false")
tensorboard = pytest.importorskip("tensorboard", reason="an extra: pip install 'gradwatch[tensorboard]'")
mlflow = pytest.importorskip("mlflow", reason="an extra: pip install 'gradwatch[mlflow]'")
wandb = pytest.importorskip("wandb", reason="an extra: pip install 'gradwatch[wandb]'")


def exploding(report: Report | str, steps: int = 60) -> gradwatch.Monitor:
    """Train into an explosion under a report."""
    model = mlp()
    with gradwatch.attach(model, clip="norm", report=report, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=30.0), steps)
    assert monitor.incidents
    return monitor


def test_tensorboard_has_scalars_and_incidents(tmp_path: Path) -> None:
    """Read by TensorBoard's own reader: the last global norm and clip coefficient, five layers, the story."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        monitor = exploding(gradwatch.reports.TensorBoard(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    history = monitor.history
    last = events.Scalars("gradwatch/global_norm")[-1]
    assert (last.step, last.value) == (59, pytest.approx(history.global_norm()[-1]))
    assert events.Scalars("gradwatch/clip_coefficient")[-1].value == pytest.approx(history.clip_coefficient()[-1])
    layers = {tag for tag in events.Tags()["scalars"] if tag.startswith("gradwatch/gradient_norm/")}
    assert len(layers) >= 5
    assert layers <= {f"gradwatch/gradient_norm/{name}" for name in history.layers}
    text = events.Tensors("gradwatch/incidents/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert str(monitor.incidents[0]) in text
    assert "auto-clip: ClipNorm" in text


def test_tensorboard_writes_below_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name alone."""
    monkeypatch.chdir(tmp_path)
    exploding("tensorboard", steps=3)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))


def test_weights_and_biases_keeps_its_own_steps(tmp_path: Path) -> None:
    """Offline, beside a user who logs by step: each of the user's rows is there, with gradwatch's numbers in some of them."""
    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(console="off", silent=True))
    model = mlp()
    report = gradwatch.reports.WeightsAndBiases(run)
    with gradwatch.attach(model, clip="norm", report=report, strict=True) as monitor:
        train(
            model,
            torch.optim.SGD(model.parameters(), lr=30.0),
            60,
            each=lambda step: run.log({"mine": step}, step=step),
        )
    summary = dict(run.summary)
    run.finish()
    assert summary["gradwatch/verdict"] == monitor.verdict
    assert str(monitor.incidents[0]) in summary["gradwatch/incidents"]
    (file,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 30  # its own process writes the file, and may still be at it
    while len(rows := logged(file)) < 60 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [row["mine"] for row in rows if "mine" in row] == list(range(60))
    ours = [row for row in rows if "gradwatch/step" in row]
    assert ours[-1]["gradwatch/global_norm"] == pytest.approx(monitor.history.global_norm()[-1])
    assert ours[-1]["gradwatch/clip_coefficient"] == pytest.approx(monitor.history.clip_coefficient()[-1])


def logged(file: Path) -> list[dict[str, float]]:
    """Return the rows of an offline run of Weights & Biases: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2 as internal

    raw, place, whole, rows = file.read_bytes(), 7, b"", []  # seven bytes say what the file is
    while place + 7 <= len(raw):
        if -place % 32768 < 7:  # the rest of a block is too short for a head
            place += -place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        if place + 7 + length > len(raw):  # half written
            break
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            record = internal.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_mlflow_has_metrics_and_incidents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local store: metrics by step, the verdict as a tag, the story as an artifact."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the other local store needs the whole of mlflow
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    monitor = exploding(gradwatch.reports.MLflow(run_id, client=client))
    last = client.get_metric_history(run_id, "gradwatch/global_norm")[-1]
    assert (last.step, last.value) == (59, pytest.approx(monitor.history.global_norm()[-1]))
    metrics = client.get_run(run_id).data.metrics
    assert metrics["gradwatch/clip_coefficient"] == pytest.approx(monitor.history.clip_coefficient()[-1])
    assert any(name.startswith("gradwatch/gradient_norm/") for name in metrics)
    assert client.get_run(run_id).data.tags["gradwatch.verdict"] == monitor.verdict
    text = (tmp_path / "artifacts" / run_id / "artifacts" / "gradwatch" / "incidents.md").read_text()
    assert str(monitor.incidents[0])[:30] in text


@pytest.mark.parametrize(("name", "call"), [("wandb", r"wandb\.init\(\)"), ("mlflow", r"mlflow\.start_run\(\)")])
def test_without_a_run_it_says_what_to_call(name: str, call: str) -> None:
    """When the first step is made."""
    model = mlp()
    with gradwatch.attach(model, report=name) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    assert any(re.search(call, note) for note in monitor.notes)


@pytest.mark.parametrize(
    ("module", "report"),
    [("torch.utils.tensorboard", "TensorBoard"), ("wandb", "WeightsAndBiases"), ("mlflow", "MLflow")],
)
def test_without_the_library_it_says_what_to_install(module: str, report: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra; training goes on."""
    monkeypatch.setitem(sys.modules, module, None)
    if report == "TensorBoard":
        with pytest.raises(UsageError, match=r"pip install 'gradwatch\[tensorboard\]'"):
            gradwatch.reports.TensorBoard()
        return
    model = mlp()
    with gradwatch.attach(model, report=getattr(gradwatch.reports, report)()) as monitor:
        losses = train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    assert np.isfinite(losses).all()
    assert any("pip install 'gradwatch[" in note for note in monitor.notes)
