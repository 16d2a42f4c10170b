"""Bad input gets a clear error with the value and the way out, and nothing is left attached."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.rules import LossJump
from tests.conftest import left_behind

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


def test_attaching_twice_is_refused_and_the_first_monitor_goes_on() -> None:
    """The error shows the monitor that is there."""
    model = nn.Linear(2, 1)
    with gradwatch.attach(model, report=None) as monitor:
        with pytest.raises(gradwatch.UsageError, match=r"already watched.*detach\(\)"):
            gradwatch.attach(model, report=None)
        assert monitor.attached
    gradwatch.attach(model, report=None).detach()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradwatch.ClipNorm(max_norm=-1), r"ClipNorm\(max_norm=-1\): Input should be greater than 0"),
        (lambda: gradwatch.ClipNorm(1.0, norm=2), "ClipNorm has no setting 'norm'. Did you mean 'max_norm'"),
        (lambda: gradwatch.AutoClip("nrom"), "Did you mean 'norm'"),
        (lambda: gradwatch.AutoClip("norm", when="explodin"), "no explosive incident kind 'explodin'.*exploding"),
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
