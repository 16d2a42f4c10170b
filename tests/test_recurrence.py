"""What norms and losses reach again and again, and what an update can have done to the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.history.recurrence import explained_rise, is_of_the_batch, usual_peak, usual_size
from gradwatch.offline.replay import replay
from gradwatch.rules import GradientSurge, StepOvershoots
from gradwatch.rules.notation import Case


def peaks_by_hand(values: list[float], at_rest: float) -> list[float]:
    """Walk over the values: the highest of each stretch above ``at_rest`` that began and ended at rest."""
    peaks, inside, highest, rested = [], False, 0.0, False
    for value in values:
        if not math.isfinite(value):
            continue
        if value <= at_rest:
            if inside and rested:
                peaks.append(highest)
            inside, highest, rested = False, 0.0, True
        else:
            inside, highest = True, max(highest, value)
    return sorted(peaks, reverse=True)


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0, 20.0, math.nan, math.inf]), max_size=60))
def test_the_usual_peak_is_the_third_highest_of_finished_excursions(values: list[float]) -> None:
    """As a walk over the values finds it; 0.0 where there are fewer than three."""
    peaks = peaks_by_hand(values, 2.0)
    assert usual_peak(np.array(values), 2.0) == (peaks[2] if len(peaks) > 2 else 0.0)


def test_growth_that_does_not_come_back_is_no_habit() -> None:
    """A norm that doubles for ever has no usual peak, however long it goes on; two peaks are not yet usual."""
    assert usual_peak(np.r_[np.ones(50), 2.0 ** np.arange(60)], 2.0) == 0.0
    assert usual_size(np.array([1, 1, 9, 1, 9, 1, 1.0]), 1.0) == 1.0
    assert usual_size(np.array([1, 1, 9, 1, 9, 1, 8, 1.0]), 1.0) == 4.0


def test_a_surge_is_measured_by_what_recurs() -> None:
    """After three returns from 300 times the typical norm another one is silent, and 100 times more than that is not."""
    rare = "0.1x20 30 0.1x9 30 0.1x9 30 0.1x9 30 0.1x9"
    for last, fires in (("30", [20, 30, 40]), ("30000", [20, 30, 40, 60])):
        alarms = replay(*Case("rare", None, grad=f"{rare} {last} 0.1x5").rows(), [GradientSurge()]).alarms
        assert [alarm.step for alarm in alarms if alarm.state == "firing"] == fires


@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "RMSprop"])
def test_a_convex_loss_never_rises_by_more_than_its_update_explains(kind: str) -> None:
    """Logistic regression on one batch, at rates up to divergence: the rise of each step lies below the bound."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), (torch.randn(64, 1) > 0).float()
    for rate in (0.01, 0.3, 10.0):
        model = nn.Linear(8, 1)
        optimizer: torch.optim.Optimizer
        if kind in ("SGD", "momentum"):
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 * (kind == "momentum"))
        else:
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=rate)
        monitor = gradwatch.attach(model, report=None, strict=True)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
            losses = monitor.history.loss()
            if len(losses) > 1 and (kind in ("SGD", "momentum") or len(losses) > 10):  # Adam's first updates are longer
                assert losses[-1] - losses[-2] <= 1.001 * explained_rise(monitor.history) + 1e-6
        monitor.detach()


def test_a_jump_of_the_data_is_told_from_a_jump_of_the_weights() -> None:
    """The same loss, 50 times its level: because the batch is another one, or because the last update was too long."""
    for cause in ("batch", "update"):
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        monitor = gradwatch.attach(model, report=None, strict=True)
        x = torch.randn(32, 8)
        for step in range(41):
            optimizer.param_groups[0]["lr"] = 3.0 if cause == "update" and step == 39 else 0.001
            far = 30.0 if cause == "batch" and step == 40 else 1.0
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), far * x[:, :1]).backward()
            optimizer.step()
        level, _ = monitor.history.loss_level()
        assert monitor.history.row.loss > 5 * level
        assert is_of_the_batch(monitor.history) is (cause == "batch")
        monitor.detach()


def test_without_a_known_update_every_jump_may_be_its_doing() -> None:
    """A line search goes as far as it likes: the bound is infinite."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters())
    x = torch.randn(8, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        return loss

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(2):
            optimizer.step(closure)
        assert math.isinf(explained_rise(monitor.history))


def test_a_step_that_overshoots_the_loss_of_one_batch_is_measured_by_what_recurs() -> None:
    """A norm of 30 beside a loss of 1 at a rate of 0.01 asks for 9 times the loss: a sign, unless such batches come again."""
    rare = "0.1x20 {0} 0.1x9 {0} 0.1x9 {0} 0.1x9"
    for usual, last, fires in ((0.2, 30, True), (2, 30, False), (2, 3000, True), (15, 30, False), (15, 3000, True)):
        series = f"{rare.format(usual)} {last} 0.1x5"
        alarms = replay(*Case("rare", None, grad=series, loss="1x56", rate=0.01).rows(), [StepOvershoots()]).alarms
        assert [alarm.step for alarm in alarms if alarm.state == "firing"] == ([50] if fires else []), (usual, last)


RARE: list[tuple[str, float, str, float, int, int]] = [  # what is learned, share, optimizer, rate, batch size, seed
    ("weighted", 0.03, "SGD", 0.03, 4, 0),
    ("weighted", 0.03, "SGD", 0.01, 4, 1),
    ("weighted", 0.05, "SGD", 0.03, 2, 0),
    ("weighted", 0.05, "SGD", 0.1, 8, 0),
    ("weighted", 0.002, "SGD", 0.01, 32, 1),
    ("weighted", 0.03, "momentum", 0.003, 4, 0),
    ("weighted", 0.03, "Adam", 0.001, 4, 0),
    ("summed", 0.01, "SGD", 0.02, 8, 1),
    ("amounts", 0.02, "SGD", 0.01, 8, 0),
    ("amounts", 0.05, "SGD", 0.01, 4, 0),
    ("amounts", 0.01, "momentum", 0.002, 8, 1),
]


def rare_training(
    what: str, share: float, kind: str, rate: float, batch: int, seed: int, jump: int = 1000
) -> gradwatch.Monitor:
    """Learn 900 steps from rows of which few matter; return the monitor. From step ``jump`` on the rate is 100 times as high."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed + 1)
    x, y = torch.randn(4000, 10, generator=draw), (torch.rand(4000, generator=draw) < share).float()
    x[y == 1] += torch.randn(10, generator=draw) * 0.8
    weight = torch.tensor((1 - share) / share)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        told, wanted = model(x[rows]).squeeze(1), y[rows]
        if what == "amounts":
            return nn.functional.mse_loss(told, wanted * 10)
        if what == "summed":
            both = torch.stack([-told / 2, told / 2], 1)
            weights = torch.stack([torch.tensor(1.0), weight])
            return nn.functional.cross_entropy(both, wanted.long(), weights, reduction="sum") / len(rows)
        return nn.functional.binary_cross_entropy_with_logits(told, wanted, pos_weight=weight)

    optimizer: torch.optim.Optimizer
    if kind == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 * (kind == "momentum"))
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(900):
            optimizer.param_groups[0]["lr"] = 100 * rate if step >= jump else rate
            optimizer.zero_grad()
            loss_of(torch.randint(4000, (batch,), generator=draw)).backward()
            optimizer.step()
    return monitor


@pytest.mark.parametrize("training", RARE)
def test_a_training_whose_signal_is_rare_is_not_called_exploding(
    training: tuple[str, float, str, float, int, int],
) -> None:
    """A batch with a rare class asks for many times its own loss, again and again; the run bears it."""
    monitor = rare_training(*training)
    assert [str(incident) for incident in monitor.incidents if incident.severity != "notice"] == []


@pytest.mark.parametrize("training", [RARE[0], RARE[8]])
def test_a_training_whose_signal_is_rare_explodes_all_the_same(
    training: tuple[str, float, str, float, int, int],
) -> None:
    """At 100 times the rate it is told within 100 steps."""
    monitor = rare_training(*training, jump=600)
    worst = [incident for incident in monitor.incidents if incident.severity == "critical"]
    assert 600 <= worst[0].opened_step < 700
