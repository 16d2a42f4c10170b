"""`gradwatch.integrations.keras` in real trainings of Keras on its torch backend."""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.truth import Loop, check

os.environ["KERAS_BACKEND"] = "torch"
pytest.importorskip("keras", reason="needs the extra `frameworks`")
import keras

from gradwatch.integrations.keras import GradwatchCallback

if TYPE_CHECKING:
    from pathlib import Path

    import gradwatch

pytestmark = pytest.mark.filterwarnings("default")  # of the framework's own code

BATCHES, BATCH, RATE = 12, 8, 0.05
PATH = "_functional._torch_params.sequential"
NAMES = {
    "0.weight": f"{PATH}/first/kernel",
    "0.bias": f"{PATH}/first/bias",
    "2.weight": f"{PATH}/second/kernel",
    "2.bias": f"{PATH}/second/bias",
}


def data(batches: int = BATCHES) -> tuple[Any, Any]:
    """Inputs and targets."""
    inputs = np.random.default_rng(1).normal(size=(batches * BATCH, 6)).astype("float32")
    return inputs, inputs.sum(1, keepdims=True)


def network(optimizer: Any = None, dtype: str = "float32", **settings: Any) -> Any:
    """A small compiled model with the same weights each time."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(12, activation="tanh", name="first", dtype=dtype),
            keras.layers.Dense(1, name="second", dtype="float32"),
        ],
        name="sequential",
    )
    model.compile(optimizer=optimizer or keras.optimizers.SGD(RATE), loss="mse", **settings)
    return model


def fit(model: Any, *callbacks: Any, batches: int = BATCHES, **settings: Any) -> Any:
    """Train; the batches come in order, and nothing is drawn unless settings say so."""
    told = {"batch_size": BATCH, "epochs": 1, "shuffle": False, "verbose": 0} | settings
    return model.fit(*data(batches), callbacks=list(callbacks), **told)


def monitor_of(callback: GradwatchCallback) -> gradwatch.Monitor:
    """The monitor of the training that has been."""
    assert callback.monitor is not None
    assert not callback.monitor.attached
    return callback.monitor


def twin_of(model: Any) -> nn.Sequential:
    """The same network with the same weights, in plain torch."""
    twin = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    with torch.no_grad():
        for (_, parameter), weight in zip(twin.named_parameters(), model.get_weights(), strict=True):
            parameter.copy_(torch.tensor(weight.T))
    return twin


def own_loop(twin: nn.Sequential, accumulate: int, max_norm: float | None, half: torch.dtype | None = None) -> Loop:
    """The same training in plain torch."""
    loop = Loop(twin, torch.optim.SGD(twin.parameters(), lr=RATE), max_norm)
    inputs, targets = map(torch.tensor, data())

    def part(index: int) -> Tensor:
        these = slice(index * BATCH, (index + 1) * BATCH)
        hidden = inputs[these]
        if half is not None:  # Keras computes a layer of another type in that type, activation included
            first = [parameter.to(half) for parameter in twin[0].parameters()]
            hidden = torch.tanh(hidden.to(half) @ first[0].T + first[1]).float()
        else:
            hidden = torch.tanh(twin[0](hidden))
        return nn.functional.mse_loss(twin[2](hidden), targets[these])

    for start in range(0, BATCHES, accumulate):
        loop.step([functools.partial(part, start + more) for more in range(accumulate)])
    loop.norms = [{NAMES[name]: norm for name, norm in norms.items()} for norms in loop.norms]
    return loop


@pytest.mark.parametrize("accumulate", [None, 4])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_rows_agree_with_a_loop_of_ones_own(accumulate: int | None, max_norm: float | None) -> None:
    """With the optimizer's own accumulation and clip, of which nothing lies in `.grad`."""
    model = network(keras.optimizers.SGD(RATE, gradient_accumulation_steps=accumulate, global_clipnorm=max_norm))
    twin, callback = twin_of(model), GradwatchCallback(report=None, strict=True)
    fit(model, callback)
    check(callback.monitor, own_loop(twin, accumulate or 1, max_norm), rtol=1e-3)


def test_rows_agree_where_the_whole_step_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Dynamo, and without the compiler behind it, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = network(keras.optimizers.SGD(RATE, global_clipnorm=0.5), jit_compile=True)
    twin, callback = twin_of(model), GradwatchCallback(report=None, strict=True)
    fit(model, callback)
    check(callback.monitor, own_loop(twin, 1, 0.5), rtol=1e-3)


@pytest.mark.parametrize("accumulate", [None, 3])
def test_rows_agree_where_the_loss_is_scaled(accumulate: int | None) -> None:
    """In half precision: losses and norms are without the scale, which is logged apart."""
    inner = keras.optimizers.SGD(RATE, gradient_accumulation_steps=accumulate, global_clipnorm=0.5)
    model = network(keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0), "mixed_float16")
    twin, callback = twin_of(model), GradwatchCallback(report=None, strict=True)
    history = fit(model, callback)
    check(callback.monitor, own_loop(twin, accumulate or 1, 0.5, torch.float16), rtol=2e-2)
    assert history.history["gradwatch/loss_scale"] == [64.0]


def test_a_step_that_the_loss_scale_leaves_out_makes_no_row() -> None:
    """Nor does its loss count for the next one."""
    scales = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE), initial_scale=2.0**24)
    model = network(scales, "mixed_float16")
    losses: list[float] = []
    made: list[int] = []

    class Keeps(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            losses.append(logs["loss"])
            made.append(int(scales.inner_optimizer.iterations))

    callback = GradwatchCallback(report=None, strict=True)
    fit(model, callback, Keeps())
    history = monitor_of(callback).history
    assert 0 < history.rows < BATCHES
    # Keras tells the mean of all losses so far
    each = np.diff(np.array(losses) * np.arange(1, BATCHES + 1), prepend=0.0)
    np.testing.assert_allclose(history.loss(), each[np.diff(made, prepend=0) == 1], rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.3}, {"clipvalue": 0.01}])
def test_watching_changes_nothing(settings: dict[str, float]) -> None:
    """The parameters are bit-identical to those of a training without the callback, and the optimizer is as before."""
    watched = network(keras.optimizers.Adam(RATE, **settings))
    before = vars(watched.optimizer).keys()
    fit(watched, GradwatchCallback(report=None))
    weights = watched.get_weights()
    assert "_clip_gradients" not in vars(watched.optimizer)
    assert {"scale_loss", "apply"} & vars(watched.optimizer).keys() == {"scale_loss", "apply"} & before
    alone = network(keras.optimizers.Adam(RATE, **settings))
    fit(alone)
    for one, other in zip(weights, alone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


class Surge(keras.callbacks.Callback):  # type: ignore[misc]
    """A rate that is far too high from batch 70 on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 1e3 if self.steps >= 70 else RATE
        self.steps += 1


def test_the_loggers_of_keras_have_the_numbers_and_the_bar_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names in each epoch; incidents, verdict and worst layers as text in the history."""
    table = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callback = GradwatchCallback(report=None, worst=2)
    model = network(keras.optimizers.SGD(RATE, global_clipnorm=0.5))
    history = fit(model, table, callback, epochs=4, validation_data=data(2), verbose=1).history
    rows = monitor_of(callback).history
    np.testing.assert_allclose(history["gradwatch/global_norm"], rows.global_norm()[BATCHES - 1 :: BATCHES])
    np.testing.assert_allclose(history["gradwatch/clip_coefficient"], rows.clip_coefficient()[BATCHES - 1 :: BATCHES])
    assert all(math.isnan(scale) for scale in history["gradwatch/loss_scale"])
    assert {len(column) for column in history.values()} == {4}
    assert history["gradwatch/verdict"] == ["healthy"] * 4
    assert history["gradwatch/worst_layers"][0].count(", ") == 1
    with (tmp_path / "log.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert float(logged[2]["gradwatch/global_norm"]) == pytest.approx(history["gradwatch/global_norm"][2])
    assert "gradwatch/" not in capsys.readouterr().out


AS_SHOWN = """\
import keras, numpy
from gradwatch.integrations.keras import GradwatchCallback
model = keras.Sequential([keras.layers.Dense(1)])
model.compile(optimizer="sgd", loss="mse")
x = y = numpy.ones((8, 1), "float32")
model.fit(x, y, epochs=2, callbacks=[GradwatchCallback(report=None)])
"""


def test_the_bar_has_not_the_numbers_of_a_callback_that_is_made_in_the_call_of_fit() -> None:
    """As the documentation shows it: there `fit` is looked up before the callback is made."""
    done = subprocess.run([sys.executable, "-c", AS_SHOWN], capture_output=True, text=True, check=True)
    assert "loss: " in done.stdout
    assert "gradwatch/" not in done.stdout


def test_a_training_is_ended_when_an_incident_is_confirmed(caplog: pytest.LogCaptureFixture) -> None:
    """By the model's own flag, and the warning says why."""
    callback = GradwatchCallback(report=None, stop_on="confirmed")
    model = network()
    history = fit(model, callback, Surge(), batches=100, epochs=3).history
    assert model.stop_training
    assert 70 < monitor_of(callback).history.rows < 100
    assert history["gradwatch/verdict"] == ["confirmed"]
    assert "exploding" in history["gradwatch/incidents"][0]
    assert "training is ended, because the run is confirmed: " in caplog.text


def test_a_checkpoint_that_is_not_worth_keeping_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither by ModelCheckpoint nor by BackupAndRestore; the reason stands in the log."""
    saves = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    backs_up = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fit(network(), saves, backs_up, GradwatchCallback(report=None), Surge(), batches=30, epochs=4)
    assert {one.name for one in tmp_path.glob("*.keras")} == {"1.keras", "2.keras"}
    assert '"epoch": 2' in (tmp_path / "backup" / "training_metadata.json").read_text()
    assert "3.keras is not saved: an incident has been open since step 7" in caplog.text
    assert "_save_model" not in vars(saves) | vars(backs_up)


def test_a_resumed_training_goes_on_with_its_reference_values(tmp_path: Path) -> None:
    """From a file of ModelCheckpoint that is named, and from a backup by itself."""
    saves = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    backs_up = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fit(network(), saves, backs_up, GradwatchCallback(report=None), batches=20, epochs=2)
    named = GradwatchCallback(report=None, strict=True, resume=tmp_path / "1.keras")
    fit(keras.models.load_model(tmp_path / "1.keras"), named, batches=20, epochs=2, initial_epoch=1)
    assert monitor_of(named).history.row.step == 39
    found = GradwatchCallback(report=None, strict=True)
    again = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    fit(network(), again, found, batches=20, epochs=3)
    assert monitor_of(found).history.row.step == 59
    assert monitor_of(found).history.rows == 20


class Raises(keras.callbacks.Callback):  # type: ignore[misc]
    """Interrupts the training before its sixth step."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 5:
            raise RuntimeError("no more data")


def test_it_detaches_when_training_raises_and_can_train_again() -> None:
    """The error is the user's; the same callback watches the next training."""
    callback, model = GradwatchCallback(report=None), network()
    with pytest.raises(RuntimeError, match="no more data"):
        fit(model, callback, Raises())
    assert monitor_of(callback).history.rows == 5
    assert "_clip_gradients" not in vars(model.optimizer)
    fit(model, callback)
    assert monitor_of(callback).history.rows == BATCHES


def test_a_list_of_callbacks_that_is_made_already_is_watched() -> None:
    """It keeps its order, and the monitor ends when training raises."""
    for more in ([], [Raises()]):
        callback, model = GradwatchCallback(report=None), network()
        made = keras.callbacks.CallbackList([callback, *more], model=model, add_history=True)
        with pytest.raises(RuntimeError, match="no more data") if more else contextlib.nullcontext():
            model.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0, callbacks=made)
        assert monitor_of(callback).history.rows == (5 if more else BATCHES)


def test_auto_clip_acts_on_the_gradients_that_the_optimizer_uses() -> None:
    """With a clip of its own, whose result is clipped further, and without one."""
    for settings in ({}, {"clipvalue": 1.0}):
        callback = GradwatchCallback(report=None, strict=True, clip=always(0.01))
        model = network(keras.optimizers.SGD(1.0, **settings))
        before = model.get_weights()
        fit(model, callback, batches=1)
        moved = math.sqrt(sum(float(np.square(a - b).sum()) for a, b in zip(model.get_weights(), before, strict=True)))
        assert moved == pytest.approx(0.01, rel=1e-3)


def always(norm: float) -> Any:
    """Auto-clip that clips each step."""
    import gradwatch

    return gradwatch.AutoClip(gradwatch.ClipNorm(norm), when="always")


def test_another_backend_is_told() -> None:
    """At import, with the way to change it."""
    script = "import keras; keras.config.backend = lambda: 'jax'\nimport gradwatch.integrations.keras"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"},
        check=False,
    )
    assert "Keras runs on its jax backend; gradwatch watches torch." in done.stderr
