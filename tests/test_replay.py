"""Rules over recorded and written rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.errors import UsageError
from gradwatch.offline.replay import replay, with_settings
from gradwatch.rules.notation import Case
from gradwatch.runlog import RunLog
from tests.test_new_tasks import fit, net
from tests.test_rule_trainings import adversarial
from tests.test_run_log import watched
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("faulty", [False, True])
def test_a_replay_knows_that_losses_oppose(faulty: bool, tmp_path: Path) -> None:
    """So that the rules which expect a loss to fall rest there too, and the one on opponents does not."""
    monitor = adversarial(faulty, log=tmp_path)
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
    assert [(a.code, a.layer, a.step, a.state) for a in again.alarms] == [
        (a.code, a.layer, a.step, a.state) for a in monitor.alarms
    ]
    assert [(i.kind, i.advice) for i in again.incidents] == [(i.kind, i.advice) for i in monitor.incidents]


def test_a_replay_finds_what_no_optimizer_holds(tmp_path: Path) -> None:
    """Its gradients are never measured; the log keeps that they arrived. One of before that was kept is read without."""
    model = nn.ModuleList([mlp(), mlp()])
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    x, y = data()
    with gradwatch.attach(model, log=tmp_path, report=None, strict=True) as monitor:
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.mse_loss(model[0](x) + model[1](x), y).backward()
            optimizer.step()
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
    assert {alarm.code for alarm in monitor.alarms} == {"GW403"}
    assert [(a.layer, a.step, a.sentence) for a in again.alarms] == [
        (a.layer, a.step, a.sentence) for a in monitor.alarms
    ]
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        db.execute("DROP TABLE arrivals")
    with RunLog(tmp_path) as log:
        assert replay(log.history(), log.rows(), rules).rows == 150


@pytest.mark.parametrize("how", ["replaced", "reset", "added"])
def test_a_replay_knows_that_a_new_task_began(how: str, tmp_path: Path) -> None:
    """Where a head is replaced or reset, or a part is added: its loss is no explosion there either."""
    model = net()
    with gradwatch.attach(model, log=tmp_path, report=None, strict=True) as monitor:
        fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), 300)
        if how == "replaced":
            model[2] = nn.Linear(64, 5)
        elif how == "reset":
            model[2].reset_parameters()  # type: ignore[operator]
        else:
            model.append(nn.Linear(5, 5))
        fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), 200, torch.tensor([3, 1, 4, 0, 2]))
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
        assert [row.step for row in log.rows() if row.begins_task] == [300]
    assert not [incident for incident in (*monitor.incidents, *again.incidents) if incident.severity != "notice"]
    assert [(a.code, a.layer, a.step, a.state) for a in again.alarms] == [
        (a.code, a.layer, a.step, a.state) for a in monitor.alarms
    ]


def test_a_replay_knows_which_optimizer_made_a_step(tmp_path: Path) -> None:
    """An update of SGD can be too long for the loss, one of Adam cannot: each row has the family of its optimizer."""
    torch.manual_seed(0)
    models = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(2))
    optimizers = [torch.optim.Adam(models[0].parameters(), lr=1e-3), torch.optim.SGD(models[1].parameters(), lr=0.01)]
    with gradwatch.attach(models, log=tmp_path, report=None, strict=True) as monitor:
        for step in range(200):
            for model, optimizer in zip(models, optimizers, strict=True):
                x = torch.randn(64, 8) * (60 if step == 150 else 1)
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), 2 * x[:, :1]).backward()
                optimizer.step()
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
        assert [row.family for row in log.rows()] == ["adam", "sgd"] * 200
    assert [(i.kind, i.severity, i.opened_step) for i in again.incidents] == [
        (i.kind, i.severity, i.opened_step) for i in monitor.incidents
    ]
    assert monitor.incidents


def test_a_replay_knows_since_when_rates_are_zero(tmp_path: Path) -> None:
    """The log keeps rates where they change: each row has those of the last change."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data()
    with gradwatch.attach(model, log=tmp_path, report=None, strict=True) as monitor:
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.01 if step < 60 else 0.0
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
        assert [row.rate is not None and row.rate[0] for row in log.rows()] == [0.01] * 60 + [0.0] * 140
    assert [incident.advice for incident in again.incidents] == [incident.advice for incident in monitor.incidents]
    assert "has been 0 since step 60" in again.incidents[0].advice[0]


@pytest.mark.parametrize(("rate", "steps"), [(0.05, 700), (1.0, 300), (30.0, 200), (1e6, 120)])
def test_the_same_rules_say_the_same_of_a_log(rate: float, steps: int, tmp_path: Path) -> None:
    """As they said in the training: the same alarms at the same steps, the same incidents."""
    monitor = watched(tmp_path, rate=rate, steps=steps)
    with RunLog(tmp_path) as log:
        rules, _ = log.rules()
        again = replay(log.history(), log.rows(), rules)
    assert again.rows == steps
    assert [(a.code, a.layer, a.step, a.state) for a in again.alarms] == [
        (a.code, a.layer, a.step, a.state) for a in monitor.alarms
    ]
    told = [(i.kind, i.severity, i.verdict, i.opened_step, i.closed_step, i.suspect, i.layers) for i in again.incidents]
    assert told == [
        (i.kind, i.severity, i.verdict, i.opened_step, i.closed_step, i.suspect, i.layers) for i in monitor.incidents
    ]


def test_other_thresholds_say_something_else() -> None:
    """A series that surges twentyfold: above a limit of 10, and not above one of 40."""
    case = Case("a surge", fires=20, grad="0.1x20 2x10", loss="1x20 9x10")
    rules = gradwatch.default_rules()
    strict = replay(*case.rows(), rules)
    lenient = replay(*case.rows(), *with_settings(rules, ["GW301.limit=40"]))
    assert strict.rows == lenient.rows == 30
    assert "GW301" in {alarm.code for alarm in strict.alarms}
    assert "GW301" not in {alarm.code for alarm in lenient.alarms}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("GW301", "expected CODE.SETTING=VALUE"),
        ("GW301.limit", "expected CODE.SETTING=VALUE"),
        ("GW301.limt=3", "no setting 'limt'. Did you mean 'limit'"),
        ("GW301.limit=wide", r"GradientSurge\(limit='wide'\)"),
        ("GW301.for_steps=0", r"GradientSurge\(for_steps='0'\)"),
        ("GW999.limit=3", "There is no rule 'GW999'"),
    ],
)
def test_a_setting_that_is_none_is_told(setting: str, said: str) -> None:
    """With what was expected."""
    with pytest.raises(UsageError, match=said):
        with_settings(gradwatch.default_rules(), [setting])


def test_a_rule_that_the_run_was_not_judged_by_is_told() -> None:
    """It has no settings to change."""
    with pytest.raises(UsageError, match=r"was not judged by GW301, but by GW101, .*, GW502\.$"):
        with_settings([rule for rule in gradwatch.default_rules() if rule.code != "GW301"], ["GW301.limit=3"])
