"""Bad input gets a clear error with the value and the way out, and nothing is left attached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.rules import LossJump
from gradwatch.runlog import RunLog
from tests.conftest import left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.records import Snapshot

MODEL = nn.Linear(2, 1)
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (nn.ReLU(), {}, r"ReLU has no trainable parameter \(0 parameters.*requires_grad_\(True\)"),
    (nn.Linear(2, 1).requires_grad_(False), {}, r"no trainable parameter \(2 parameters"),
    ("model", {}, r"got 'model' as model; expected a torch.nn.Module"),
    (nn.LazyLinear(3), {}, "Run one batch through the model"),
    (MODEL, {"clip": "nrom"}, r"There is no clip 'nrom'. Did you mean 'norm'\?"),
    (MODEL, {"clip": 1.0}, r"clip=1.0; expected None, 'norm', 'value'.*ClipNorm\(max_norm=1.0\)"),
    (MODEL, {"report": "liv"}, r"no report 'liv'. Did you mean 'live'\?"),
    (MODEL, {"report": 3}, "got 3 as report"),
    (MODEL, {"rules": [LossJump]}, r"got the class LossJump among rules; expected an instance: LossJump\(\)"),
    (MODEL, {"rules": [3]}, "got 3 among rules; expected instances of gradwatch.Rule"),
    (MODEL, {"rules": "GW102"}, "expected a list of Rule instances"),
    (MODEL, {"rules": [LossJump(), LossJump(limit=5.0)]}, "GW102 more than once"),
    (MODEL, {"every": 0}, "every=0; expected a whole number of at least 1"),
    (MODEL, {"every": 2.5}, "every=2.5"),
    (MODEL, {"budget": 2}, "budget=2; expected a share between 0 and 1"),
    (MODEL, {"budget": True}, "budget=True"),
    (MODEL, {"budget": 0.01, "every": 4}, "a budget chooses every"),
    (MODEL, {"budget": 0.01, "clip": "norm"}, "each has to be measured"),
    (MODEL, {"optimizer": "SGD"}, "got 'SGD' as optimizer"),
    (MODEL, {"scaler": 65536.0}, "got 65536.0 as scaler"),
    (MODEL, {"strict": "yes"}, "strict='yes'; expected True or False"),
    (MODEL, {"log": 3}, "log=3; expected the path of a folder"),
    (MODEL, {"log": __file__}, "is a file; expected a folder"),
    (MODEL, {"report": ["tensorboard", "liv"]}, "no report 'liv'"),
    (
        MODEL,
        {"optimizer": torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)},
        r"The SGD owns none of the 2 parameters of this Linear. Build the optimizer from model.parameters\(\)",
    ),
]


@pytest.mark.parametrize(("model", "settings", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_refused_in_full(model: Any, settings: dict[str, Any], message: str) -> None:
    """What happened, the value, what was expected, what to do; a ValueError; nothing attached."""
    with pytest.raises(gradwatch.UsageError, match=f"(?s){message}") as caught:
        gradwatch.attach(model, **{"report": None, **settings})
    assert isinstance(caught.value, ValueError)
    assert left_behind() == []


@pytest.mark.parametrize(("_", "settings", "message"), BAD[4:], ids=[message[:40] for *_, message in BAD[4:]])
def test_bad_input_leaves_the_monitor_that_there_was(
    _: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Whatever is wrong with the second call: the first monitor goes on, its report is not ended, its log is written."""
    model, report = nn.Linear(2, 1), Told()
    first = gradwatch.attach(model, report=report, log=tmp_path)
    with pytest.raises(gradwatch.UsageError, match=f"(?s){message}"):
        gradwatch.attach(model, **{"report": None, **settings})
    assert first.attached
    assert gradwatch.monitor_of(model) is first
    with pytest.raises(gradwatch.UsageError, match=r"expected a torch\.nn\.Module"):
        gradwatch.monitor_of("model")  # type: ignore[arg-type]
    train(model)
    assert not report.ended
    assert first.flush()
    first.detach()
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == [0, 1, 2]


def test_a_log_that_is_refused_leaves_the_monitor_that_there_was(tmp_path: Path) -> None:
    """It is another model's."""
    gradwatch.attach(other := nn.Sequential(nn.Linear(2, 1)), report=None, log=tmp_path).detach()
    model = nn.Linear(2, 1)
    with gradwatch.attach(model, report=None) as first:
        with pytest.raises(gradwatch.UsageError, match="of another model"):
            gradwatch.attach(model, report=None, log=tmp_path)
        assert first.attached
        assert gradwatch.monitor_of(model) is first
    with gradwatch.attach(other, report=None, log=tmp_path):  # and it is not left locked
        pass


class Told(gradwatch.Report):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.began = self.ended = 0
        self.notes: tuple[str, ...] = ()

    def start(self) -> None:
        """See `Report`."""
        self.began += 1

    def step(self, snapshot: Snapshot) -> None:
        """See `Report`."""
        self.notes = snapshot.notes

    def close(self, snapshot: Snapshot) -> None:
        """See `Report`."""
        self.ended += 1
        self.notes = snapshot.notes


def train(model: nn.Module, steps: int = 3) -> None:
    """Train for some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).pow(2).mean().backward()
        optimizer.step()


def test_a_cell_that_is_run_again_replaces_the_monitor(tmp_path: Path) -> None:
    """The old one is detached, its report ended, its log closed; that is said once; the log goes on in the same file."""
    model = nn.Linear(2, 1)
    first, second = Told(), Told()
    before = gradwatch.attach(model, report=first, log=tmp_path)
    train(model)
    monitor = gradwatch.attach(model, clip="norm", report=second, log=tmp_path)
    assert not before.attached
    assert (first.began, first.ended) == (1, 1)
    train(model)
    assert gradwatch.monitor_of(model) is monitor
    assert [note for note in monitor.notes if "watched already" in note] == [
        f"this Linear was watched already, for 3 steps: that monitor is detached, its run log {tmp_path} ended."
    ]
    assert list(second.notes) == monitor.notes
    assert str(monitor.summary()).count("watched already") == 1
    before.detach()
    assert monitor.attached
    monitor.detach()
    assert (second.began, second.ended) == (1, 1)
    with RunLog(tmp_path) as log:
        assert len(log.sessions) == 2
    assert left_behind() == []


def test_the_same_report_may_serve_the_next_monitor() -> None:
    """It is ended by the first and started by the second."""
    model, report = nn.Linear(2, 1), Told()
    gradwatch.attach(model, report=report)
    with gradwatch.attach(model, report=report):
        assert (report.began, report.ended) == (2, 1)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_wrapped_model_is_the_model(wrap: Any) -> None:
    """What torch builds around a model has the model's monitor, and the other way round."""
    model = nn.Linear(2, 1)
    around = wrap(model)
    first = gradwatch.attach(model, report=None)
    assert gradwatch.monitor_of(around) is first
    second = gradwatch.attach(around, report=None)
    assert not first.attached
    assert gradwatch.monitor_of(model) is gradwatch.monitor_of(around) is second
    third = gradwatch.attach(model, report=None)
    assert not second.attached
    third.detach()
    assert gradwatch.monitor_of(model) is None


def test_a_part_of_a_watched_model_may_be_watched_by_itself_but_not_clipped_by_two() -> None:
    """Each has its monitor; auto-clip of one alone acts on a parameter."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    whole = gradwatch.attach(model, clip="norm", report=None)
    assert gradwatch.monitor_of(model[0]) is None
    with pytest.raises(gradwatch.UsageError, match=r"acts on parameters of this Linear already.*detach\(\) first"):
        gradwatch.attach(model[0], clip="norm", report=None)
    part = gradwatch.attach(model[0], report=None)
    train(model)
    assert gradwatch.monitor_of(model[0]) is part
    assert part.history.grad_norm(last=3) == pytest.approx(whole.history.grad_norm(last=3)[:, :2], rel=1e-12)
    part.detach()
    assert whole.attached
    again = gradwatch.attach(model, clip="value", report=None)
    assert again.attached
    again.detach()


def test_a_model_without_a_monitor_has_none() -> None:
    """Before, after, and when it is gone."""
    model = nn.Linear(2, 1)
    assert gradwatch.monitor_of(model) is None
    gradwatch.attach(model, report=None).detach()
    assert gradwatch.monitor_of(model) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradwatch.ClipNorm(max_norm=-1), r"ClipNorm\(max_norm=-1\): Input should be greater than 0"),
        (lambda: gradwatch.ClipNorm(1.0, norm=2), "ClipNorm has no setting 'norm'. Did you mean 'max_norm'"),
        (lambda: gradwatch.AutoClip("nrom"), "Did you mean 'norm'"),
        (
            lambda: gradwatch.AutoClip("norm", when="explodin"),
            r"^AutoClip\(when='explodin'\): there is no explosive incident kind 'explodin'\. Did you mean 'exploding'\?$",
        ),
        (lambda: gradwatch.AutoClip("norm", when="alway"), r"Did you mean 'always'\?$"),
        (lambda: gradwatch.AutoClip("norm", hold=0), r"AutoClip\(hold=0\)"),
        (lambda: gradwatch.AutoClip("norm", on_nonfinite="skp"), "on_nonfinite='skp'"),
        (lambda: LossJump(limit=math.nan), r"LossJump\(limit=nan\): Input should be a finite number"),
        (lambda: LossJump(window=1), r"LossJump\(window=1\)"),
    ],
)
def test_settings_are_validated(make: Any, message: str) -> None:
    """Unknown names, NaN, out of range."""
    with pytest.raises(gradwatch.UsageError, match=message):
        make()


@pytest.mark.parametrize("loss", ["2.3", torch.ones(3), None])
def test_a_loss_that_is_no_number_is_refused(loss: Any) -> None:
    """At the call, with the value."""
    with (
        gradwatch.attach(nn.Linear(2, 1), report=None) as monitor,
        pytest.raises(gradwatch.UsageError, match=r"monitor.loss\(\) got"),
    ):
        monitor.loss(loss)


def test_attaching_computes_no_parametrised_weight() -> None:
    """`spectral_norm` goes on with its iteration whenever its weight is asked for: its vectors stay as they were."""
    model = torch.nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 1)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradwatch.attach(model, report=None).detach()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_megatron_is_refused_with_the_reason() -> None:
    """Its gradients are not where torch has them, and zeros are never reported."""
    model = nn.Linear(2, 1)
    model.weight.main_grad = torch.zeros(1, 2)  # type: ignore[attr-defined]
    with pytest.raises(gradwatch.errors.UsageError, match="Megatron-LM keeps gradients in main_grad"):
        gradwatch.attach(model, report=None)
    assert gradwatch.monitor_of(model) is None
