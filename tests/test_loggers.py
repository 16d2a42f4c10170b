"""Reports for the loggers that users already have, read back with the real libraries, offline."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.errors import UsageError
from gradwatch.reports import mlflow as mlflow_report
from gradwatch.text.extras import install_command
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradwatch.history.history import History
    from gradwatch.reports import Report

# neither shall call home from a test; both read this when they are imported
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false")
tensorboard = pytest.importorskip("tensorboard", reason="an extra: pip install 'gradwatch[tensorboard]'")
mlflow = pytest.importorskip("mlflow", reason="an extra: pip install 'gradwatch[mlflow]'")
wandb = pytest.importorskip("wandb", reason="an extra: pip install 'gradwatch[wandb]'")
EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator


def exploding(report: Report | str, steps: int = 60) -> gradwatch.Monitor:
    """Train into an explosion under a report."""
    model = mlp()
    with gradwatch.attach(model, clip="norm", report=report, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=30.0), steps)
    assert monitor.incidents
    return monitor


def numbers_of(history: History) -> dict[str, Any]:
    """Return what a logger must have of each row, by name."""
    return {
        "loss": history.loss(),
        "global_norm": history.global_norm(),
        "global_norm_after_clip": history.global_norm() * history.clip_coefficient(),
        "clip_coefficient": history.clip_coefficient(),
        "learning_rate": history.learning_rate(),
    }


def test_tensorboard_has_scalars_and_incidents(tmp_path: Path) -> None:
    """Read by TensorBoard's own reader: the numbers of each step, five layers, the story."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        monitor = exploding(gradwatch.reports.TensorBoard(writer))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    history = monitor.history
    for name, values in numbers_of(history).items():
        found = events.Scalars(f"gradwatch/{name}")
        assert [one.step for one in found] == list(range(60))
        assert [one.value for one in found] == pytest.approx(values, rel=1e-6, nan_ok=True)
        times = np.diff([one.wall_time for one in found])
        assert (times >= 0).all()
    assert "gradwatch/loss_scale" not in events.Tags()["scalars"]
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
        if 0 < -place % 32768 < 7:  # the rest of a block is too short for a head
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


def test_weights_and_biases_has_each_step_where_its_steps_are_free(tmp_path: Path) -> None:
    """Asked for, beside a user who does not count steps: a row for each recorded step, and all of the user's."""
    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(console="off", silent=True))
    model = mlp()
    report = gradwatch.reports.WeightsAndBiases(run, every_step=True)
    with gradwatch.attach(model, report=report, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 300, each=lambda step: run.log({"mine": step}))
    run.finish()
    (file,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 30
    while len(rows := logged(file)) < 600 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [row["mine"] for row in rows if "mine" in row] == list(range(300))
    ours = {row["gradwatch/step"]: row for row in rows if "gradwatch/loss" in row}
    assert sorted(ours) == list(range(300))
    for name, values in numbers_of(monitor.history).items():
        assert [ours[step][f"gradwatch/{name}"] for step in range(300)] == pytest.approx(values)


def test_a_slow_server_of_mlflow_neither_stops_the_training_nor_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches beyond the bound are left out, and a tag says how many."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow_report, "_WAITING", 2)
    monkeypatch.setattr(mlflow_report, "_BATCH", 100)
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    run_id = client.create_run(client.create_experiment("test")).info.run_id
    ready = threading.Event()
    send = client.log_batch
    monkeypatch.setattr(client, "log_batch", lambda *args, **told: ready.wait(60) and send(*args, **told))
    model = mlp()
    with gradwatch.attach(model, report=gradwatch.reports.MLflow(run_id, client=client), strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 300)
        assert monitor.history.rows == 300  # although nothing was sent yet
        ready.set()
    kept = client.get_metric_history(run_id, "gradwatch/loss")
    left_out = int(client.get_run(run_id).data.tags["gradwatch.batches_left_out"])
    assert 0 < len(kept) < 300
    assert left_out >= 10
    losses = monitor.history.loss()
    assert [one.value for one in kept] == pytest.approx([losses[one.step] for one in kept])


def test_a_logger_has_each_step_of_a_fast_run(tmp_path: Path) -> None:
    """Also when far more steps than the history keeps are made within a second."""
    from torch.utils.tensorboard import SummaryWriter

    steps = 3000
    model = mlp()
    with (
        SummaryWriter(str(tmp_path)) as writer,
        gradwatch.attach(model, report=gradwatch.reports.TensorBoard(writer), strict=True),
    ):
        losses = train(model, torch.optim.SGD(model.parameters(), lr=0.01), steps)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars("gradwatch/loss")
    assert [one.step for one in found] == list(range(steps))
    assert [one.value for one in found] == pytest.approx(losses, rel=1e-6)


def test_a_writer_of_another_kind_gets_the_same() -> None:
    """One that has `add_scalar` and no event file, such as tensorboardX's."""
    kept: dict[str, list[tuple[int, float]]] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int, when: float) -> None:
            kept.setdefault(name, []).append((step, value))

        def add_text(self, name: str, text: str, step: int) -> None:
            pass

        def flush(self) -> None:
            pass

    monitor = exploding(gradwatch.reports.TensorBoard(Writer()))
    for name, values in numbers_of(monitor.history).items():
        assert [step for step, _ in kept[f"gradwatch/{name}"]] == list(range(60))
        assert [value for _, value in kept[f"gradwatch/{name}"]] == pytest.approx(values, nan_ok=True)


def test_mlflow_has_metrics_and_incidents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local store: metrics by step, the verdict as a tag, the story as an artifact."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the other local store needs the whole of mlflow
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    monitor = exploding(gradwatch.reports.MLflow(run_id, client=client))
    for name, values in numbers_of(monitor.history).items():
        found = client.get_metric_history(run_id, f"gradwatch/{name}")
        assert [one.step for one in found] == list(range(60))
        assert [one.value for one in found] == pytest.approx(values, nan_ok=True)
    metrics = client.get_run(run_id).data.metrics
    assert any(name.startswith("gradwatch/gradient_norm/") for name in metrics)
    assert client.get_run(run_id).data.tags["gradwatch.verdict"] == monitor.verdict
    text = (tmp_path / "artifacts" / run_id / "artifacts" / "gradwatch" / "incidents.md").read_text()
    assert str(monitor.incidents[0])[:30] in text


def two_models(report: Callable[[], Report]) -> dict[str, gradwatch.Monitor]:
    """Train a generator and a critic in turns, each with a report of its own to the same logger."""
    models = {"generator": mlp(seed=0), "critic": mlp(seed=1)}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.05) for name, model in models.items()}
    monitors = {
        name: gradwatch.attach(model, name=name, report=report(), strict=True) for name, model in models.items()
    }
    for _ in range(10):
        for name, model in models.items():
            train(model, optimizers[name], 4 if name == "critic" else 1)
    for monitor in monitors.values():
        monitor.detach()
    return monitors


def test_tensorboard_keeps_two_models_apart(tmp_path: Path) -> None:
    """By their names, in one writer."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        monitors = two_models(lambda: gradwatch.reports.TensorBoard(writer))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    for model, monitor in monitors.items():
        for name, values in numbers_of(monitor.history).items():
            assert [one.value for one in events.Scalars(f"gradwatch/{model}/{name}")] == pytest.approx(values, rel=1e-6)
        assert f"gradwatch/{model}/verdict/text_summary" in events.Tags()["tensors"]
    assert not {"gradwatch/loss", "gradwatch/open_incidents"} & set(events.Tags()["scalars"])


def test_mlflow_keeps_two_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names, in one run."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    run_id = client.create_run(client.create_experiment("test")).info.run_id
    monitors = two_models(lambda: gradwatch.reports.MLflow(run_id, client=client))
    for model, monitor in monitors.items():
        for name, values in numbers_of(monitor.history).items():
            found = client.get_metric_history(run_id, f"gradwatch/{model}/{name}")
            assert [one.value for one in found] == pytest.approx(values)
        assert client.get_run(run_id).data.tags[f"gradwatch.{model}.verdict"] == monitor.verdict


def test_weights_and_biases_keeps_two_models_apart(tmp_path: Path) -> None:
    """By their names, in one run; each counts its own steps."""
    run = wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(console="off", silent=True))
    monitors = two_models(lambda: gradwatch.reports.WeightsAndBiases(run, every_step=True))
    summary = dict(run.summary)
    run.finish()
    (file,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 30
    while len(rows := logged(file)) < 50 and time.monotonic() < deadline:
        time.sleep(0.2)
    for model, monitor in monitors.items():
        ours = {row[f"gradwatch/{model}/step"]: row for row in rows if f"gradwatch/{model}/loss" in row}
        losses = [row[f"gradwatch/{model}/loss"] for _, row in sorted(ours.items())]
        assert losses == pytest.approx(monitor.history.loss())
        assert summary[f"gradwatch/{model}/verdict"] == monitor.verdict


@pytest.mark.parametrize(("name", "call"), [("wandb", r"wandb\.init\(\)"), ("mlflow", r"mlflow\.start_run\(\)")])
def test_without_a_run_it_says_what_to_call(name: str, call: str) -> None:
    """When the first step is made."""
    model = mlp()
    with gradwatch.attach(model, report=name) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    assert any(re.search(call, note) for note in monitor.notes)


@pytest.mark.parametrize(
    ("module", "report"), [("torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_without_the_library_attach_says_what_to_install(
    module: str, report: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra; nothing is left attached."""
    monkeypatch.setitem(sys.modules, module, None)
    model = mlp()
    with pytest.raises(UsageError, match=re.escape(install_command(report))):
        gradwatch.attach(model, report=report)
    assert gradwatch.monitor_of(model) is None
