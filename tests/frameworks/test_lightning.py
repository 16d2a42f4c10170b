"""`gradwatch.integrations.lightning` in real trainings of Lightning's Trainer."""

from __future__ import annotations

import copy
import csv
import functools
import linecache
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.truth import Loop, check

pytest.importorskip("lightning", reason="needs the extra `frameworks`")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision

from gradwatch.integrations.lightning import GradwatchCallback

if TYPE_CHECKING:
    from pathlib import Path

    import gradwatch

pytestmark = pytest.mark.filterwarnings("default")  # of the framework's own code

mse, bce = nn.functional.mse_loss, nn.functional.binary_cross_entropy_with_logits
BATCHES, BATCH, RATE = 16, 8, 0.05
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pairs(batches: int = BATCHES) -> torch.utils.data.TensorDataset:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    return torch.utils.data.TensorDataset(
        inputs, inputs.sum(1, keepdim=True) + torch.randn(len(inputs), 1, generator=generator)
    )


def network(inputs: int = 6, outputs: int = 1) -> nn.Sequential:
    """A small network with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))


class Module(pl.LightningModule):  # type: ignore[misc]
    """Fits the network; from step ``surge`` on its rate is far too high."""

    def __init__(self, surge: int = 10**9, raises: int = 10**9) -> None:
        super().__init__()
        self.net = network()
        self.surge, self.raises = surge, raises

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.global_step == self.raises:
            raise RuntimeError("no more data")
        for group in self.optimizers().param_groups:
            group["lr"] = 1e3 if self.global_step >= self.surge else RATE
        loss = mse(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", mse(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def fit(module: Any, *callbacks: Any, batches: int = BATCHES, resume: Any = None, **settings: Any) -> pl.Trainer:
    """Train on the CPU; nothing is drawn, logged or saved unless settings say so."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "max_epochs": 1,
    }
    trainer = pl.Trainer(
        **quiet | settings, accelerator="cpu", devices=1, enable_model_summary=False, callbacks=list(callbacks)
    )
    held_out = loader(2) if "val_check_interval" in settings else None
    trainer.fit(module, loader(batches), held_out, ckpt_path=resume)
    return trainer


def loader(batches: int) -> Any:
    """The same batches in the same order each time."""
    return torch.utils.data.DataLoader(pairs(batches), batch_size=BATCH)


def own_loop(accumulate: int, max_norm: float | None, autocast: torch.dtype | None = None, epochs: int = 1) -> Loop:
    """The same training in plain torch."""
    module = Module()
    loop = Loop(module, torch.optim.SGD(module.parameters(), lr=RATE), max_norm)

    def part(batch: Any) -> Tensor:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return mse(module.net(batch[0]), batch[1])

    for _ in range(epochs):
        batches = list(loader(BATCHES))
        for start in range(0, BATCHES, accumulate):
            group = batches[start : start + accumulate]
            # Lightning divides by the number of batches of a whole step, in a smaller last step as well
            loop.step([functools.partial(part, batch) for batch in group], of=accumulate)
    return loop


@pytest.mark.parametrize("accumulate", [1, 4, 3])
@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("validation", [False, True])
def test_rows_agree_with_a_loop_of_ones_own(accumulate: int, max_norm: float | None, validation: bool) -> None:
    """With accumulation, `gradient_clip_val` and validation in between, over two epochs."""
    callback = GradwatchCallback(report=None, strict=True)
    settings: dict[str, Any] = {"val_check_interval": 5} if validation else {}
    fit(
        Module(),
        callback,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=max_norm,
        max_epochs=2,
        **settings,
    )
    check(callback.monitor, own_loop(accumulate, max_norm, epochs=2))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_rows_agree_in_mixed_precision(precision: Any, dtype: torch.dtype, accumulate: int) -> None:
    """Without the loss scale, which is logged apart."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    callback = GradwatchCallback(report=None, strict=True)
    plugins = [MixedPrecision(precision, "cpu", scaler)]
    fit(Module(), callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.3, plugins=plugins)
    check(callback.monitor, own_loop(accumulate, 0.3, dtype), rtol=2e-2 if dtype is torch.bfloat16 else 2e-3)


def test_clipping_by_value_is_seen() -> None:
    """Norms are those before it."""
    callback = GradwatchCallback(report=None, strict=True)
    fit(Module(), callback, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    loop = own_loop(1, None)
    history = monitor_of(callback).history
    assert history.global_norm()[0] == pytest.approx(np.sqrt(sum(one**2 for one in loop.norms[0].values())), rel=1e-4)
    assert history.clip_coefficient()[0] < 0.2


class Game(pl.LightningModule):  # type: ignore[misc]
    """A generator and a discriminator with an optimizer each, optimized by hand. It keeps what each step's row must hold."""

    def __init__(self, toggles: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(3, 6), network()
        self.toggles = toggles
        self.truth: list[tuple[float, dict[str, float]]] = []

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(one.parameters(), lr=1e-2) for one in (self.generator, self.discriminator)]

    def training_step(self, batch: Any, index: int) -> None:
        noise, ones = torch.randn(BATCH, 3), torch.ones(BATCH, 1)
        self._update(0, "generator", lambda: bce(self.discriminator(self.generator(noise)), ones))

        def judged() -> Tensor:
            made = self.generator(noise).detach()
            return bce(self.discriminator(batch[0]), ones) + bce(self.discriminator(made), torch.zeros(BATCH, 1))

        self._update(1, "discriminator", judged)

    def _update(self, index: int, part: str, loss_of: Any) -> None:
        optimizer = self.optimizers()[index]
        if self.toggles:
            self.toggle_optimizer(optimizer)
        loss = loss_of()
        optimizer.zero_grad()
        self.manual_backward(loss)
        norms = {
            f"{part}.{name}": float(one.grad.double().norm()) for name, one in getattr(self, part).named_parameters()
        }
        self.truth.append((loss.item(), norms))
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("toggles", [True, False])
def test_each_optimizer_has_rows_with_its_own_loss(toggles: bool) -> None:
    """Manual optimization of two optimizers in turns, with toggled parameters and without."""
    callback, module = GradwatchCallback(report=None, strict=True), Game(toggles)
    fit(module, callback)
    history = monitor_of(callback).history
    assert history.rows == len(module.truth) == 2 * BATCHES
    np.testing.assert_allclose(history.loss(), [loss for loss, _ in module.truth], rtol=1e-5)
    expected = [[norms.get(name, np.nan) for name in history.layers] for _, norms in module.truth]
    np.testing.assert_allclose(history.grad_norm(), expected, rtol=1e-5)


def monitor_of(callback: GradwatchCallback) -> gradwatch.Monitor:
    """The monitor of the training that has been."""
    assert callback.monitor is not None
    assert not callback.monitor.attached
    return callback.monitor


def test_watching_changes_nothing() -> None:
    """The parameters are bit-identical to those of a training without the callback."""
    watched, alone = Module(), Module()
    fit(watched, GradwatchCallback(report=None), gradient_clip_val=0.3)
    fit(alone, gradient_clip_val=0.3)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_trainers_loggers_have_the_numbers(tmp_path: Path) -> None:
    """Each of them, at the steps at which Lightning logs; incidents as text."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    callback = GradwatchCallback(report=None, worst=2)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    fit(
        Module(surge=70),
        callback,
        batches=200,
        accumulate_grad_batches=2,
        logger=[board, table],
        log_every_n_steps=5,
        gradient_clip_val=0.3,
        plugins=plugins,
    )
    history = monitor_of(callback).history
    read = events.EventAccumulator(board.log_dir).Reload()
    norms = read.Scalars("gradwatch/global_norm")
    assert [one.step for one in norms] == [one.step for one in read.Scalars("loss")] == list(range(4, 100, 5))
    np.testing.assert_allclose([one.value for one in norms][:14], history.global_norm()[4:70:5], rtol=1e-6)
    after = [one.value for one in read.Scalars("gradwatch/global_norm_after_clip")]
    np.testing.assert_allclose(after[:14], np.minimum(history.global_norm()[4:70:5], 0.3), rtol=1e-3)
    assert read.Scalars("gradwatch/loss_scale")[0].value == 64.0
    assert any("gradient_norm/net." in name for name in read.Tags()["scalars"])
    texts = {
        name: [one.tensor_proto.string_val[0].decode() for one in read.Tensors(name)] for name in read.Tags()["tensors"]
    }
    told = "".join(next(found for name, found in texts.items() if "gradwatch/incidents" in name))
    assert "exploding" in told
    assert "confirmed" in next(found for name, found in texts.items() if "gradwatch/verdict" in name)
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:  # noqa: PTH123
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["gradwatch/global_norm"]] == [str(one.step) for one in norms]
    assert "confirmed" in [row["gradwatch/verdict"] for row in rows]


def test_a_training_is_ended_when_an_incident_is_confirmed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the Trainer's own flag, and the warning says why; the last step is logged."""
    callback, table = GradwatchCallback(report=None, stop_on="confirmed"), CSVLogger(tmp_path)
    trainer = fit(Module(surge=70), callback, batches=200, logger=table, log_every_n_steps=500)
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:  # noqa: PTH123
        norms = {
            row["step"]: row["gradwatch/global_norm"] for row in csv.DictReader(file) if row["gradwatch/global_norm"]
        }
    last = monitor_of(callback).history.global_norm()[-1]
    assert {step: float(norm) for step, norm in norms.items()} == {str(trainer.global_step - 1): pytest.approx(last)}
    assert trainer.should_stop
    assert 70 < trainer.global_step < 90
    assert monitor_of(callback).verdict == "confirmed"
    assert "training is ended, because the run is confirmed: " in caplog.text


def test_a_checkpoint_that_is_not_worth_keeping_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither as one of the best nor as the last; every file that the callback names is there."""
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=20, save_last=True)
    fit(Module(surge=70), GradwatchCallback(report=None), saves, batches=120, enable_checkpointing=True)
    assert {one.name.partition("step=")[2] for one in tmp_path.glob("epoch*")} == {"20.ckpt", "40.ckpt", "60.ckpt"}
    assert torch.load(saves.last_model_path, weights_only=False)["global_step"] == 60
    assert torch.load(saves.best_model_path, weights_only=False)["global_step"] == 60
    assert "the checkpoint of step 80 is not saved: an incident has been open since step 7" in caplog.text
    assert not {"_save_topk_checkpoint", "_save_last_checkpoint"} & vars(saves).keys()


def test_a_resumed_training_goes_on_with_its_reference_values(tmp_path: Path) -> None:
    """They are in the checkpoint; steps are counted on."""
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=40)
    fit(Module(), GradwatchCallback(report=None), saves, batches=60, enable_checkpointing=True)
    file = next(tmp_path.glob("*step=40.ckpt"))
    kept = torch.load(file, weights_only=False)["callbacks"]["GradwatchCallback"]

    class Begins(pl.Callback):  # type: ignore[misc]
        state: Any = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert second.monitor is not None
            Begins.state = copy.deepcopy(second.monitor.state_dict())

    second = GradwatchCallback(report=None, strict=True)
    fit(Module(), second, Begins(), batches=60, resume=file)
    assert kept["step"] == 40
    np.testing.assert_equal(Begins.state, kept)
    assert monitor_of(second).history.row.step == 59


def test_it_detaches_when_training_raises() -> None:
    """The error is the user's."""
    callback = GradwatchCallback(report=None)
    with pytest.raises(RuntimeError, match="no more data"):
        fit(Module(raises=5), callback)
    assert monitor_of(callback).history.rows == 5


def test_a_trainer_fits_twice() -> None:
    """Each training has a monitor of its own."""
    callback, module = GradwatchCallback(report=None), Module()
    trainer = fit(module, callback)
    first = monitor_of(callback)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(BATCHES))
    assert monitor_of(callback) is not first
    assert first.history.rows == BATCHES
    assert monitor_of(callback).history.rows == 2 * BATCHES


def test_a_compiled_module_is_watched() -> None:
    """Names are the module's own."""
    callback = GradwatchCallback(report=None, strict=True)

    class Plain(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:  # Dynamo does not trace `self.log`
            return mse(self.net(batch[0]), batch[1])

    fit(torch.compile(Plain(), backend="eager"), callback)
    check(callback.monitor, own_loop(1, None))


def test_auto_clip_acts_under_the_trainer() -> None:
    """The steps of the surge are clipped before Lightning makes them."""
    callback = GradwatchCallback(report=None, strict=True, clip="norm")
    module = Module(surge=70)
    fit(module, callback, batches=100)
    snapshot = monitor_of(callback).snapshot()
    assert snapshot.clipped + snapshot.skipped > 0
    assert all(torch.isfinite(one).all() for one in module.parameters())


def test_texts_go_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As artifacts, since it has no texts among its metrics."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/runs", artifact_location=str(tmp_path / "files"))
    fit(Module(surge=70), GradwatchCallback(report=None), batches=100, logger=logger, log_every_n_steps=5)
    assert logger.experiment.get_metric_history(logger.run_id, "gradwatch/global_norm")[-1].step == 99
    folder = tmp_path / "files" / logger.run_id / "artifacts" / "gradwatch"
    assert any("exploding" in file.read_text() for file in folder.glob("incidents-*.md"))
    assert mlflow


def test_texts_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among what is logged; offline here."""
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    try:
        fit(Module(surge=70), GradwatchCallback(report=None), batches=100, logger=logger, log_every_n_steps=5)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert summary["gradwatch/verdict"] == "confirmed"
    assert "exploding" in summary["gradwatch/incidents"]
    assert np.isnan(summary["gradwatch/global_norm"])  # of the last steps; what is not finite is not hidden


class Logarithm(nn.Module):
    """Takes the logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Failing(Module):
    """Has a root of zeros in the code of its loss, or a logarithm of zeros in a part."""

    def __init__(self, *, in_part: bool) -> None:
        super().__init__()
        self.in_part = in_part
        self.save_hyperparameters({"weight": 0.1})
        if in_part:
            self.net.append(nn.ReLU())
            self.net.append(Logarithm())

    def training_step(self, batch: Any, index: int) -> Any:
        return {"loss": self.shared_step(batch, "train")}

    def shared_step(self, batch: Any, stage: str) -> Tensor:
        """Return the loss of a batch, and log it."""
        inputs, targets = batch
        out = self.net(inputs)
        penalty = (out * (out > 0)).sqrt().mean()
        loss: Tensor = mse(out, targets) + self.hparams.weight * penalty * torch.ones((), device=self.device)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/penalty": penalty})
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("in_part", [False, True])
def test_the_operation_and_its_line_are_named_where_lightning_calls_backward(
    precision: str, accumulate: int, *, in_part: bool
) -> None:
    """In the code of the loss, whose function has ended by then, and in a part of the module, which is not called itself."""
    module, callback = Failing(in_part=in_part), GradwatchCallback(report=None, forensics=True)
    fit(module, callback, batches=4, precision=precision, accumulate_grad_batches=accumulate)
    assert callback.monitor is not None
    found = next(one.origin for one in callback.monitor.incidents if one.origin is not None)
    if in_part:
        assert (found.op, found.direction, found.module) == ("log", "forward", "net.4")
        return
    assert (found.op, found.direction, found.part) == ("sqrt", "backward", "loss code")
    assert linecache.getline(found.file, found.line).strip() == "penalty = (out * (out > 0)).sqrt().mean()"
