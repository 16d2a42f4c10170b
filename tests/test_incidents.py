"""Signs -> verdict: written runs through the whole host half, no torch involved."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import device
from gradwatch.offline.replay import replay
from gradwatch.pipeline import Pipeline
from gradwatch.records import Facts, Incident
from gradwatch.reports.notes import Notes
from gradwatch.rules import RULES, Rule, default_rules
from gradwatch.rules.notation import Case
from gradwatch.verdict.settings import VerdictSettings
from tests.trainings import data, mlp


def run(case: Case, facts: Facts | None = None) -> Pipeline:
    """Run a written case through the pipeline."""
    history, rows = case.rows()
    if facts is not None:
        history.know(facts)
    pipeline = Pipeline(history, default_rules(), None, [], Notes(strict=True))
    for row in rows:
        pipeline.judge(row)
    return pipeline


def only(pipeline: Pipeline) -> Incident:
    """Return the one incident there is."""
    assert len(pipeline.incidents.all) == 1
    return pipeline.incidents.all[0]


def test_large_but_stable_gradients_are_no_incident() -> None:
    """A confirming sign alone is a note."""
    pipeline = run(
        Case("stable", None, grad={"a": "50x200", "b": "9x200"}, weight="100x200", loss="1*0.99x200", rate=1e-4)
    )
    assert [alarm.code for alarm in pipeline.changes] == ["GW203"]
    assert pipeline.incidents.all == []
    assert pipeline.verdict == "healthy"


def test_an_explosion_is_one_incident_with_the_layers_in_the_order_in_which_they_left() -> None:
    """Two hundred alarms, one story; it opens with growth and is confirmed by large weights."""
    case = Case(
        "explosion",
        None,
        grad={"first": "0.1x40 0.5 2*3x20", "last": "0.1x43 2*3x20", "middle": "0.1x42 2*3x20"},
        weight={"first": "1x43 1*2x20", "last": "1x60", "middle": "1x60"},
        loss="1x41 2*4x20",
        family="other",
    )
    incident = only(run(case))
    assert (incident.kind, incident.severity, incident.verdict) == ("exploding", "critical", "confirmed")
    assert incident.opened_step == 42
    assert incident.confirmed_step is not None
    assert incident.confirmed_step > 42
    assert incident.layers == ("first", "middle", "last")
    assert incident.suspect == "first"
    assert {"GW102", "GW201", "GW301"} <= {sign.code for sign in incident.signs}


def test_growth_while_the_loss_keeps_falling_opens_nothing() -> None:
    """At the end of a plateau gradients grow because learning begins."""
    case = Case("learning begins", None, grad="0.01x60 0.01*1.2x20 0.3x40", loss="1x60 1*0.97x60", weight="1x120")
    assert run(case).incidents.all == []


def test_one_jump_that_returns_is_a_spike_and_a_notice() -> None:
    """It closes after a calm stretch."""
    incident = only(run(Case("spike", None, loss="1x40 9 1x60")))
    assert (incident.kind, incident.severity, incident.verdict) == ("spike", "notice", "resolved")
    assert (incident.opened_step, incident.closed_step) == (40, 65)


def test_a_loss_that_stays_up_is_diverging() -> None:
    """A jump that lasts is no spike, where an update may have made it; else it is another task."""
    for rate, kind, severity in ((0.5, "diverging", "warning"), (0.01, "spike", "notice")):
        incident = only(run(Case("diverging", None, loss="1x40 9x18", rate=rate)))
        assert (incident.kind, incident.severity) == (kind, severity)


def test_nan_in_one_layers_gradient_names_it_and_the_phase() -> None:
    """The first in backward order, not the first in the table."""
    case = Case("nan", None, grad={"first": "1x30 nan", "last": "1x30 nan"}, weight="1x31", loss="1x31")
    incident = only(run(case))
    assert (incident.kind, incident.phase, incident.suspect) == ("nonfinite", "gradient", "last")
    assert incident.severity == "critical"


def test_a_loss_that_goes_nan_first_blames_no_layer() -> None:
    """The phase is the loss; NaN weights confirm it later."""
    case = Case(
        "nan",
        None,
        grad={"a": "1x30 nanx5", "b": "1x30 nanx5"},
        weight={"a": "1x31 nanx4", "b": "1x35"},
        loss="1x30 nanx5",
    )
    incident = only(run(case))
    assert (incident.kind, incident.phase, incident.suspect, incident.verdict) == (
        "nonfinite",
        "loss",
        None,
        "confirmed",
    )
    assert (incident.opened_step, incident.confirmed_step) == (30, 31)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (Case("flat", None, loss="2x300"), "stalled"),
        (Case("vanishing", None, grad={"a": "1e-9x80", "b": "0.01x80"}, loss="1*0.99x80"), "vanishing"),
        (Case("dead", None, dead={"a": "0.9x80", "b": "0x80"}, loss="1*0.99x80"), "dead"),
        (Case("frozen", None, unchanged={"a": "0+1x80", "b": "0x80"}, loss="1*0.99x80"), "frozen"),
    ],
)
def test_the_silent_faults_are_stories_of_their_own(case: Case, kind: str) -> None:
    """Stalled, vanishing, dead, frozen."""
    incident = only(run(case))
    assert incident.kind == kind
    if kind != "stalled":
        assert incident.layers == ("a",)


def test_every_incident_has_advice_for_a_user() -> None:
    """At most four lines."""
    for case in (
        Case("flat", None, loss="2x300"),
        Case("spike", None, loss="1x40 9 1x40"),
        Case("nan", None, grad="1x9 nan"),
    ):
        assert 1 <= len(only(run(case)).advice) <= 4


EXPLOSION = Case("explosion", None, grad="0.1x40 0.1*5x9", loss="1x40 1*5x9", weight="1x49", family="other")


def test_an_adam_learning_rate_fault_is_not_advised_to_clip() -> None:
    """Adam divides gradients by their own size: lower the rate; a clip helps against single batches only."""
    advice = " ".join(only(run(replace(EXPLOSION, rate=0.3), Facts(optimizer="AdamW", family="adam"))).advice)
    assert advice.startswith("Lower the learning rate (0.3 when this began), or warm it up.")
    assert "a clip does not repair a rate that is too high for long, because AdamW divides" in advice


def test_a_vanilla_rnn_is_advised_gates_and_shorter_sequences() -> None:
    """And an SGD fault to clip."""
    advice = " ".join(only(run(EXPLOSION, Facts(optimizer="SGD", family="other", recurrent=True))).advice)
    assert "LSTM or GRU" in advice
    assert "truncate backpropagation" in advice
    assert 'attach(model, clip="norm")' in advice


def test_unscaled_targets_are_named_with_the_loss_they_began_with() -> None:
    """The figure comes from the run."""
    case = Case("explosion", None, grad="10x40 10*5x9", loss="2e4x40 2e4*5x9", weight="1x49", family="other")
    assert only(run(case)).advice[0].startswith("Scale the targets and the inputs to about one, if they are not")
    assert "the loss of the first step was 20,000" in only(run(case)).advice[0]


def test_a_written_run_needs_no_torch() -> None:
    """The same numbers always give the same incident."""
    first, again = only(run(EXPLOSION)), only(run(EXPLOSION))
    assert first == again
    assert isinstance(first, gradwatch.Incident)
    assert np.isfinite(first.signs[0].value)


def test_a_resumed_run_knows_a_surge_in_its_first_steps() -> None:
    """Its typical norms came with the checkpoint; a fresh monitor has none yet and has to wait."""
    before, rows = Case("before", None, grad="0.1x200", loss="0.5x200", family="adam").rows()
    for row in rows:
        before.push(row)
        before.learn()
    surge = Case("after", None, grad="0.1x4 20x4", loss="0.5x4 0.9x4", family="adam")
    found = []
    for state in (None, before.state_dict()):
        history, rows = surge.rows()
        if state is not None:
            history.load_state_dict(state)
        pipeline = Pipeline(history, default_rules(), None, [], Notes())
        for row in rows:
            pipeline.judge(row)
        found.append([(incident.kind, incident.opened_step) for incident in pipeline.incidents.all])
    assert found == [[], [("exploding", 5)]]


def test_the_layer_whose_weights_were_changed_is_the_suspect_whoever_left_its_band_first() -> None:
    """All gradients leave their band in the step after the damage; one layer's weights say where it was done."""
    case = Case(
        "damage",
        None,
        grad={"first": "0.1x80 9x4", "damaged": "0.1x80 5x4", "last": "0.1x80 30x4"},
        weight={"first": "4x84", "damaged": "4x80 120x4", "last": "4x84"},
        loss="1x80 60 80 90 95",
        family="adam",
    )
    incident = only(run(case))
    assert incident.suspect == "damaged"
    assert any("damaged changed its norm by a factor of 30 in the " in line for line in incident.evidence)


@pytest.mark.parametrize(
    ("loss", "grad", "weight", "by"),
    [
        ("1x64 50x6 38x200", "0.1x200", "4x200", 128),  # falls a little, and stays up
        ("1x64 50x200", "0.1x64 5x200", "4x200", 128),
        ("1x64 50 40x200", "0.1x64 5x200", "4x200", 128),  # the gradients stay fifty times as large
        ("1x64 12x5 9x200", "0.1x64 3x200", "4x64 4*1.3x40", 74),  # the weights explode behind a loss that stays
        ("1x64 50 80 200 900", "0.1x64 200 400 1e3 5e3x20", "4x84", 65),  # goes on rising
    ],
)
def test_a_jump_that_does_not_come_down_again_is_told(loss: str, grad: str, weight: str, by: int) -> None:
    """As a spike at first; as more when the loss stays up for a window of 64 steps, goes on rising, or when weights explode."""
    case = Case("jump", None, grad={"a": grad, "b": grad}, weight={"a": weight, "b": weight}, loss=loss, family="adam")
    pipeline = run(case)
    first, *_ = pipeline.incidents.all
    assert first.opened_step == 64
    assert first.severity in ("warning", "critical")
    told = [alarm.step for alarm in pipeline.changes]
    assert min(told) >= 64
    history, rows = case.rows()
    early = Pipeline(history, default_rules(), None, [], Notes())
    for row in rows:
        early.judge(row)
        if any(incident.severity != "notice" for incident in early.incidents.all):
            break
    assert history.row.step <= by


@pytest.mark.parametrize(
    ("loss", "grad"),
    [
        ("0.02x100 7.7 7 7.7 5.4 5.1 3.5 3.2 2.7 2.9 2.2 2.1 2*0.97x120", "0.4x100 7x4 4 3.6 3 2.8 2 1.5 1*0.98x120"),
        ("0.25x60 1.5 1.8 1.1 0.8 0.7 0.6x8 0.48x8 0.4x40", "0.4x60 3 3 2 1.8 1.4 1 0.8x60"),
    ],
)
def test_a_change_of_the_task_stays_a_notice(loss: str, grad: str) -> None:
    """The loss jumps and comes down again, and so do the gradients."""
    pipeline = run(Case("task", None, grad={"a": grad, "b": grad}, weight="5x200", loss=loss, family="adam"))
    assert {incident.severity for incident in pipeline.incidents.all} == {"notice"}


@pytest.mark.parametrize(("calm", "kind"), [(60, "diverging"), (160, "spike")])
def test_a_jump_soon_after_an_explosion_is_its_return_and_no_change_of_the_task(calm: int, kind: str) -> None:
    """The same jump long after it is a notice at first."""
    loss, grad = f"1x40 50 80 200 900 1x{calm} 12 7 6 5 4 2 1x4", f"10x40 2e4 4e4 1e5 5e5 10x{calm + 10}"
    exploded, jumped, *_ = run(Case("again", None, loss=loss, grad=grad, weight="4x300")).incidents.all
    assert (exploded.kind, exploded.opened_step) == ("exploding", 40)
    assert exploded.closed_step is not None
    assert (jumped.kind, jumped.opened_step) == (kind, 44 + calm)
    assert (jumped.severity == "notice") is (kind == "spike")


def test_an_explosion_has_left_the_dead_units_that_were_found_in_it() -> None:
    """It was "resolved" in the step in which the incident of the dead units opened."""
    loss, grad = "1x40 50 80 200 900 1x200", "10x40 2e4 4e4 1e5 5e5 10x200"
    pipeline = run(Case("dead", None, loss=loss, grad=grad, weight="4x300", dead="0x40 0.9x150 0x100"))
    exploded, dead, *_ = pipeline.incidents.all
    assert (exploded.kind, dead.kind) == ("exploding", "dead")
    assert dead.opened_step == exploded.closed_step
    assert exploded.verdict == dead.verdict == "resolved"  # at the end they live again
    early, *_ = run(Case("dead", None, loss=loss, grad=grad, weight="4x200", dead="0x40 0.9x160")).incidents.all
    assert early.verdict == "damaged"
    assert "units of layer were dead" in early.left[0]


def test_a_jump_before_there_is_a_level_does_not_last() -> None:
    """One that the last update cannot have made: the first losses were small by chance; one that it can have is a divergence."""
    for before, rate, kind in ((4, 0.01, "spike"), (40, 100.0, "diverging")):
        loss, grad = f"1x{before} 12 1 2x3 2.5x80", f"0.1x{before + 80}"
        rows = Case("jump", None, loss=loss, grad=grad, weight="1e3", rate=rate).rows()
        assert [incident.kind for incident in replay(*rows, default_rules()).incidents] == [kind]


@pytest.mark.parametrize("missing", RULES, ids=lambda rule: rule.code)
@pytest.mark.parametrize("later", [False, True], ids=["cpu", "as on a device"])
def test_without_any_one_rule_an_explosion_is_still_told_and_clipped(
    missing: type[Rule], later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rule's code is known to anybody else: what the verdict must know of a rule is the rule's own attribute."""
    if later:
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = mlp(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    rules = [rule for rule in default_rules() if rule.code != missing.code]
    (x, y), factor = data(), 1.0
    with gradwatch.attach(model, clip="norm", rules=rules, report=None, strict=True) as monitor:
        for step in range(90):
            factor *= 3.0 if step >= 70 else 1.0
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * factor).backward()
            optimizer.step()
    assert [incident.kind for incident in monitor.incidents if incident.severity != "notice"] == ["exploding"]
    assert monitor.history.clip_coefficient().min() < 0.5
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("wanted", [True, False])
def test_a_surge_on_a_device_is_clipped_in_its_own_step(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless nobody wants to be told of it: its rule was taken out."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = mlp(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, fused=True)
    rules = [rule for rule in default_rules() if wanted or rule.code != "GW301"]
    x, y = data()
    with gradwatch.attach(model, clip="norm", rules=rules, report=None, strict=True) as monitor:
        for step in range(60):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (1e4 if step == 40 else 1.0)).backward()
            optimizer.step()
    assert np.flatnonzero(monitor.history.clip_coefficient() < 0.01).tolist() == [40] * wanted


def test_a_loss_that_the_task_made_larger_has_not_run_away() -> None:
    """Fifty times the first losses at once, with gradients that cannot have done it; slowly to there is a divergence."""
    for loss, fires in (("1x40 50*0.995x200", False), ("1x40 1*1.05x100", True)):
        alarms = replay(*Case("", None, loss=loss, grad="0.1x240").rows(), default_rules()).alarms
        assert ("GW104" in {alarm.code for alarm in alarms}) == fires


def test_the_verdicts_own_limits_can_be_changed() -> None:
    """A surge of 60 beside a well loss speaks for itself at five times its limit of 10, not at seven."""
    case = Case("surge", None, grad={"a": "0.1x40 6x3 0.1x40", "b": "0.1x83", "c": "0.1x83"}, loss="1x83")
    for settings, opened in ((VerdictSettings(), 1), (VerdictSettings(far=7), 0)):
        incidents = replay(*case.rows(), default_rules(), settings).incidents
        assert len([one for one in incidents if one.severity != "notice"]) == opened


def test_a_notice_is_never_confirmed() -> None:
    """A jump at large gradients in each layer that comes back is a notice, and no confirmed trouble."""
    incident = only(run(Case("spike", None, loss="1x40 9 1x60", grad="3x101")))
    assert (incident.kind, incident.severity, incident.confirmed_step) == ("spike", "notice", None)
    assert "confirmed" not in str(incident)


@pytest.mark.parametrize(
    ("rate", "family", "opened"),
    [
        ("0.3", "sgd", 0),
        ("0.8", "sgd", 1),
        ("0.01", "adam", 1),
        ("0.2x70 0.3", "sgd", 1),
    ],
    ids=["within the edge", "beyond it", "no gradient descent", "while the rate rises"],
)
def test_a_swing_that_gradient_descent_bears_is_no_explosion(
    rate: str, family: Literal["sgd", "adam"], opened: int
) -> None:
    """At a rate of 0.3, the longest step would take 2.4 from a loss of 1.3; more than 5.2 would prove that it is too long."""
    grad, loss = "0.1x80 1 1.5 2 2 2 1.5 1 0.1x30", "1x80 1.1 1.2 1.3x3 1.2 1.1 1x30"
    case = Case("a swing", None, grad={"a": grad, "b": grad}, loss=loss, rate=rate, family=family)
    assert sum(one.severity != "notice" for one in replay(*case.rows(), default_rules()).incidents) == opened
