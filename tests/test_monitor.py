"""The promises: watching changes nothing, detaching leaves nothing, failing stops nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.conftest import left_behind
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.records import Floats, Kind, Sign, Snapshot

OPTIMIZERS = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"foreach": True}),
    ("SGD", {"fused": True}),
    ("Adam", {}),
    ("Adam", {"foreach": True}),
    ("AdamW", {}),
    ("AdamW", {"fused": True}),
    ("RMSprop", {"foreach": False}),
    ("RMSprop", {"foreach": True}),
]


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_watching_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    """Losses and final parameters are bit-identical with and without `attach`, armed auto-clip included."""

    def run(attach: bool) -> tuple[list[float], list[Tensor]]:
        model = mlp(activation=nn.Tanh)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **settings)
        monitor = gradwatch.attach(model, clip="norm", report=None) if attach else None
        losses = train(model, optimizer, 100)
        if monitor is not None:
            monitor.detach()
            assert monitor.history.rows == 100
            assert monitor.history.clip_coefficient().tolist() == [1.0] * 100
        return losses, [parameter.detach() for parameter in model.parameters()]

    (losses, parameters), (plain_losses, plain_parameters) = run(True), run(False)
    assert losses == plain_losses
    assert all(torch.equal(one, other) for one, other in zip(parameters, plain_parameters, strict=True))


def test_the_check_for_things_left_behind_can_fail() -> None:
    """An attached monitor is found by the check that every test ends with."""
    model = mlp()
    watching = gradwatch.attach(model, report=None)
    assert len(left_behind()) == 4
    watching.detach()
    assert left_behind() == []


def test_detach_leaves_the_model_as_it_was() -> None:
    """No hook, no attribute, no patch; training goes on without rows."""
    model = mlp()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    monitor = gradwatch.attach(model, report=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    monitor.detach()
    monitor.detach()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for parameter in model.parameters():
        assert parameter._post_accumulate_grad_hooks is None
        assert not parameter._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train(model, optimizer, 5)
    assert monitor.history.rows == 5


def test_a_model_can_be_copied_and_saved_while_attached(tmp_path: Any) -> None:
    """`deepcopy`, `pickle`, `torch.save`, `state_dict`; the copy is not watched."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 2)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert set(model.state_dict()) == {f"{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
        for other in (twin, again, loaded):
            for one, theirs in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(one, theirs)
        train(twin, torch.optim.SGD(twin.parameters(), lr=0.01), 2)
        assert monitor.history.rows == 2


def test_in_place_activations_and_dictionary_outputs_work() -> None:
    """Where full backward hooks raise or never fire."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.body(x)}

    model = Model()
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x)["y"], y).backward()
            optimizer.step()
    assert monitor.history.rows == 3


def test_a_monitor_that_is_not_kept_goes_on_and_ends_with_its_model() -> None:
    """`gradwatch.attach(model)` alone is enough, and it never keeps the model alive."""
    model = mlp()
    reference = weakref.ref(model)
    gradwatch.attach(model, report=None)
    gc.collect()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), 2)
    del model
    gc.collect()
    assert reference() is None
    assert left_behind() == []


@pytest.mark.parametrize(
    "container",
    [
        lambda a, b: nn.ModuleList([a, b]),
        lambda a, b: nn.ModuleDict({"a": a, "more": nn.ModuleList([b])}),
        lambda a, b: nn.Sequential(a, nn.ReLU(), b),
        lambda a, b: nn.ParameterList([*a.parameters(), *b.parameters()]),
        lambda a, b: torch.compile(nn.ModuleList([a, b])),
        lambda a, b: nn.DataParallel(nn.ModuleDict({"a": a, "b": b})),
    ],
    ids=["list", "nested", "sequential", "parameters", "compiled", "wrapped"],
)
def test_what_is_in_a_container_made_for_attach_alone_is_watched(container: Callable[[Any, Any], nn.Module]) -> None:
    """The program keeps the modules and not the container; it is watched by its parts."""
    a, b = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 1)
    monitor = gradwatch.attach(container(a, b), report=None, strict=True, forensics=True)
    gc.collect()
    _train_parts(a, b, monitor)
    assert monitor.history.rows == 40
    (incident,) = monitor.incidents
    assert incident.origin is not None
    assert incident.origin.op == "log"
    assert not monitor.checkpoint_guard()
    again = gradwatch.attach(container(a, b), report=None)
    assert any("was watched already, for 40 steps" in note for note in again.notes)
    assert (monitor.attached, again.attached) == (False, True)
    again.detach()


def test_a_module_that_the_program_drops_is_told_and_the_others_are_watched() -> None:
    """As where a notebook builds the encoder anew, and the list that `attach` got was not kept."""
    a, b = nn.Linear(8, 8), nn.Linear(8, 1)
    monitor = gradwatch.attach(nn.ModuleList([a, b]), report=None, strict=True)
    _train_parts(a, b, monitor)
    a = nn.Linear(8, 8)
    gc.collect()
    train(b, torch.optim.SGD(b.parameters(), lr=0.01), 2)
    assert monitor.history.rows == 42
    (note,) = (note for note in monitor.notes if "dropped" in note)
    assert note.startswith("0 of what was attached: watched no further")
    del b
    gc.collect()
    assert not monitor.attached
    assert left_behind() == []


def test_a_model_that_shares_a_part_with_the_next_one_is_gone_all_the_same() -> None:
    """As the folds of a cross-validation share a backbone: its monitor ends with it."""
    backbone = nn.Linear(8, 8)
    monitors = []
    for _ in range(2):
        model = nn.Sequential(backbone, nn.ReLU(), nn.Linear(8, 1))
        monitors.append(gradwatch.attach(model, report=None))
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 2)
    assert [monitor.attached for monitor in monitors] == [False, True]
    assert monitors[1].notes == monitors[0].notes
    monitors[1].detach()


def _train_parts(a: nn.Module, b: nn.Module, monitor: gradwatch.Monitor) -> None:
    """Train two modules for 40 steps, of which the last loss is NaN, and compare each norm with torch's."""
    parts = [*a.parameters(), *b.parameters()]
    optimizer = torch.optim.SGD(parts, lr=0.01)
    for step in range(40):
        loss = b(a(torch.randn(16, 8)).relu()).square().mean()
        optimizer.zero_grad()
        (loss if step < 39 else (loss - 1e9).log()).backward()
        norm = torch.stack([p.grad.norm() for p in parts if p.grad is not None]).norm()
        optimizer.step()
        assert monitor.history.global_norm(last=1)[0] == pytest.approx(norm.item(), nan_ok=True)


def test_the_context_manager_detaches_when_training_raises() -> None:
    """And lets the error through."""
    model = mlp()
    with pytest.raises(KeyError), gradwatch.attach(model, report=None):
        raise KeyError
    assert left_behind() == []


class Failing(gradwatch.Rule):
    """A rule with a bug."""

    code: ClassVar[str] = "XX001"
    name: ClassVar[str] = "failing"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"

    def measure(self, history: Any) -> Floats:
        """Divide by zero."""
        return 1 / 0  # type: ignore[return-value]


class FailingReport(gradwatch.Report):
    """A report with a bug."""

    period: ClassVar[float] = 0.0

    def step(self, snapshot: Snapshot) -> None:
        """Raise."""
        raise OSError("no screen")

    def close(self, snapshot: Snapshot) -> None:
        """Raise."""
        raise OSError("no screen")


def test_a_failure_inside_gradwatch_is_told_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """The failing parts are switched off; the others still work."""
    model = mlp()
    with gradwatch.attach(model, rules=[*gradwatch.default_rules(), Failing()], report=FailingReport()) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 5)
    assert monitor.history.rows == 5
    assert [record.getMessage() for record in caplog.records] == [
        "gradwatch: rule XX001 failing failed and is switched off; training goes on.",
        "gradwatch: report FailingReport failed and is switched off; training goes on.",
    ]
    assert all(record.exc_info for record in caplog.records)
    assert len(monitor.notes) == 2


def test_a_failing_measurement_switches_the_monitor_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it reaches the loop, and every hook is gone."""
    monkeypatch.setattr("gradwatch.probe.gradients.global_norm_of", lambda _: 1 / 0)
    model = mlp()
    with gradwatch.attach(model, report=None) as monitor:
        assert len(train(model, torch.optim.SGD(model.parameters(), lr=0.01), 5)) == 5
        assert len(monitor._probe.gradient_hooks) == 0
    assert "measuring failed" in caplog.text
    assert len(caplog.records) == 1


def test_strict_raises_errors_inside_gradwatch() -> None:
    """For those who want to know at once."""
    model = mlp()
    with pytest.raises(ZeroDivisionError), gradwatch.attach(model, rules=[Failing()], report=None, strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 1)


def test_baselines_survive_a_resume_through_a_file() -> None:
    """`state_dict` goes through `torch.save` with safe loading, and the step count goes on."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None) as monitor:
        train(model, optimizer, 30)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    with gradwatch.attach(model, report=None, strict=True) as resumed:
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        train(model, optimizer, 1)
        assert resumed.history.steps().tolist() == [30]
        known = ~np.isnan(resumed.history.surge())
        assert (known == resumed.history.matrices).all()  # biases are judged by their weights


def test_the_summary_is_plain_text_as_a_string() -> None:
    """And names model, optimizer and provenance."""
    model = mlp()
    with gradwatch.attach(model, report=None) as monitor:
        assert "0 steps" in str(monitor.summary())
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 3)
    text = str(monitor.summary())
    assert "healthy: 3 steps of Sequential (6 layers, 433 parameters) with SGD" in text
    assert "\x1b" not in text
    assert "no clip seen before it" in text
