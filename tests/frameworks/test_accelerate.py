"""`gradwatch.integrations.accelerate` in loops with a real Accelerator."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.errors import UsageError
from tests.frameworks.truth import Loop, check

pytest.importorskip("accelerate", reason="needs the extra `frameworks`")
import accelerate

from gradwatch.integrations.accelerate import GradwatchMonitor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("default")  # of the framework's own code

BATCHES, BATCH, RATE = 12, 8, 0.05
mse = nn.functional.mse_loss


@pytest.fixture(autouse=True)
def each_test_has_its_own_accelerator() -> Iterator[None]:
    """Its state is kept by the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def loader(batches: int = BATCHES) -> Any:
    """The same batches in the same order each time."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    pairs = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(pairs, batch_size=BATCH)


def network() -> nn.Sequential:
    """A small network with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))


def prepared(batches: int = BATCHES, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """Return an accelerator with a model, its optimizer and its data."""
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    model = network()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader(batches))


@pytest.mark.parametrize("accumulate", [1, 4, 5])
@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rows_agree_with_a_loop_of_ones_own(accumulate: int, max_norm: float | None, precision: str) -> None:
    """With `accumulate`, whose last step is made of fewer batches, and `clip_grad_norm_`."""
    accelerator, model, optimizer, data = prepared(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    with GradwatchMonitor(accelerator, model, report=None, strict=True) as watched:
        for inputs, targets in data:
            with accelerator.accumulate(model):
                accelerator.backward(mse(model(inputs), targets))
                if max_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
    twin, batches = network(), list(loader())
    loop = Loop(twin, torch.optim.SGD(twin.parameters(), lr=RATE), max_norm)

    def part(batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = twin(batch[0])
        return mse(output.float(), batch[1])

    for start in range(0, BATCHES, accumulate):
        loop.step([functools.partial(part, batch) for batch in batches[start : start + accumulate]], of=accumulate)
    check(watched.monitor, loop, rtol=2e-2 if precision == "bf16" else 1e-4)


def test_its_logs_go_to_the_accelerators_trackers(tmp_path: Path) -> None:
    """Numbers of the last step, and as text what has changed."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    accelerator, model, optimizer, data = prepared(100, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("board")
    with GradwatchMonitor(accelerator, model, report=None, stop_on="confirmed", worst=2) as watched:
        for step, (inputs, targets) in enumerate(data):
            optimizer.param_groups[0]["lr"] = 1e3 if step >= 70 else RATE
            loss = mse(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss.item()} | watched.logs(), step=step)
            if watched.should_stop:
                break
    accelerator.end_training()
    assert 70 < step < 80
    history = watched.monitor.history
    read = events.EventAccumulator(str(tmp_path / "board")).Reload()
    norms = read.Scalars("gradwatch/global_norm")
    assert [one.step for one in norms] == list(range(step + 1))
    np.testing.assert_allclose([one.value for one in norms], history.global_norm(), rtol=1e-6)
    texts = {name: read.Tensors(name) for name in read.Tags()["tensors"]}
    told = next(found for name, found in texts.items() if "gradwatch/incidents" in name)
    assert "exploding" in told[-1].tensor_proto.string_val[0].decode()


def test_a_checkpoint_keeps_the_reference_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the state is loaded again they are restored; one without them can be loaded as well."""
    accelerator, model, optimizer, data = prepared(40)

    def train() -> None:
        for inputs, targets in data:
            accelerator.backward(mse(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()

    with GradwatchMonitor(accelerator, model, report=None) as watched:
        train()
        assert watched.is_worth_saving()
        accelerator.save_state(str(tmp_path / "kept"))
        kept = watched.monitor.state_dict()
    accelerator.save_state(str(tmp_path / "bare"))
    assert not (tmp_path / "bare" / "gradwatch.json").exists()
    assert json.loads((tmp_path / "kept" / "gradwatch.json").read_text())["step"] == 40
    with GradwatchMonitor(accelerator, model, report=None, strict=True) as watched:
        accelerator.load_state(str(tmp_path / "bare"))
        assert watched.monitor.history.rows == 0
        accelerator.load_state(str(tmp_path / "kept"))
        np.testing.assert_equal(watched.monitor.state_dict(), kept)
        train()
        assert watched.monitor.history.row.step == 79
        with torch.no_grad():
            next(iter(model.parameters())).fill_(float("nan"))
        assert not watched.is_worth_saving("the last one")
    assert "the last one is not saved: parameter 0.weight holds 72 NaN" in caplog.text


def test_it_detaches_when_training_raises() -> None:
    """The error is the user's, and no hook is left on the accelerator."""
    accelerator, model, _, _ = prepared()
    with (
        pytest.raises(RuntimeError, match="no more data"),
        GradwatchMonitor(accelerator, model, report=None) as watched,
    ):
        raise RuntimeError("no more data")
    assert not watched.monitor.attached
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook


def test_something_else_than_an_accelerator_is_refused() -> None:
    """With what was expected; nothing is left attached."""
    with pytest.raises(UsageError, match=r"GradwatchMonitor\(\) got 1; expected an accelerate.Accelerator"):
        GradwatchMonitor(1, network())
