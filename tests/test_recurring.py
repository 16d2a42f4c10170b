"""What comes back: jumps with a period, a routine of the program unless they grow, and steps that are not finite."""

from __future__ import annotations

import copy
import io
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.reports.log import LogReport
from gradwatch.verdict.recurring import Recurrence, Recurring

if TYPE_CHECKING:
    from collections.abc import Callable


def places(*jumps: tuple[int, float]) -> list[Recurrence]:
    """Where each of these jumps stands."""
    recurring = Recurring()
    return [recurring.jumped(step, loss) for step, loss in jumps]


def test_two_equal_distances_make_a_series_and_the_start_of_the_run_counts() -> None:
    """Periods without a jump belong to it; one that comes at another time ends it."""
    assert [one.times for one in places((200, 1), (400, 1), (600, 1), (1000, 1))] == [1, 2, 3, 4]
    assert places((200, 1), (400, 1), (1000, 1))[-1].period == 200
    assert [one.period for one in places((37, 1), (87, 1), (137, 1), (160, 1))] == [None, None, 50, None]
    assert places((37, 1), (87, 1), (137, 1))[-1].times == 3
    assert [one.period for one in places((100, 1), (180, 1), (300, 1))] == [None] * 3


def test_a_series_whose_jumps_grow_is_no_routine() -> None:
    """Five in a row, each higher than the one before, up to ten times the first one, and from then on."""
    *before, after, later = places((200, 1), (400, 2), (600, 4), (800, 9), (1000, 11), (1200, 5))
    assert all(one.routine for one in before[1:])
    assert not after.routine
    assert not later.routine


@pytest.mark.parametrize(
    "losses",
    [[1, 9, 81, 729], [1, 2, 40, 30, 60, 90], [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]],
    ids=["few", "not in order", "little"],
)
def test_a_series_that_may_have_grown_by_chance_or_by_little_is_a_routine(losses: list[float]) -> None:
    """As when a curriculum has four tasks, each on targets three times as large."""
    assert all(one.routine for one in places(*((200 * (n + 1), loss) for n, loss in enumerate(losses)))[1:])


def fitted(times: float, clip: str | None = None, every: int = 100, steps: int = 900) -> tuple[gradwatch.Monitor, str]:
    """Fit targets that change every 100 steps and are ``times`` as large then; return the monitor and its lines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    lines = io.StringIO()
    with gradwatch.attach(model, report=LogReport(lines), clip=clip, strict=True) as monitor:
        for number in range(steps):
            if number % every == 0:
                direction = nn.functional.normalize(torch.randn(8, 1, generator=generator), dim=0) * times ** (
                    number // every
                )
            x = torch.randn(64, 8, generator=generator)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), torch.tanh(x @ direction) * times ** (number // every)).backward()
            optimizer.step()
    return monitor, lines.getvalue()


@pytest.mark.parametrize("clip", [None, "norm"])
def test_targets_that_change_with_a_period_are_a_routine(clip: str | None) -> None:
    """From the second time on: notices that say when, no clipped step, no rule that expects the loss to fall."""
    monitor, lines = fitted(1.0, clip)
    again = [incident for incident in monitor.incidents if incident.period is not None]
    assert [incident.severity for incident in again] == ["notice"] * len(again)
    assert len(again) >= 4
    assert f"the {again[-1].times}th time, about every 100 steps" in str(again[-1])
    assert monitor.verdict == "healthy"
    assert all(incident.clip is None for incident in again)
    assert any("it jumps about every 100 steps farther than an update can raise it" in note for note in monitor.notes)
    assert lines.count("do: Look at what the program does about every 100 steps") == 1
    assert f"do: as at step {again[0].opened_step}" in lines


def test_targets_that_grow_with_a_period_run_away() -> None:
    """They are told, with the period."""
    monitor, _ = fitted(2.0)
    grave = [
        incident for incident in monitor.incidents if incident.severity != "notice" and incident.period is not None
    ]
    assert grave
    assert "the values run away" in grave[-1].advice[0]
    assert monitor.verdict != "healthy"


def retargeted(seed: int, targets: str, clip: str | None = None) -> gradwatch.Monitor:
    """Fit ones for 300 steps, then "another" mean with noise, or nothing but "noise" of their size; return the monitor."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-4)
    with gradwatch.attach(model, report=None, clip=clip, strict=True) as monitor:
        for step in range(450):
            x = torch.randn(64, 4)
            target = torch.ones(64, 1)
            if step >= 300:
                target = 0.3 * torch.randn(64, 1) if targets == "another" else torch.randn(64, 1)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
    return monitor


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [None, "norm"])
def test_targets_that_are_learned_as_the_first_ones_were_are_no_explosion(seed: int, clip: str | None) -> None:
    """The loss was 1e-4: it jumps to where the run began, and need not be back there in 24 steps."""
    monitor = retargeted(seed, "another", clip)
    assert {incident.severity for incident in monitor.incidents} == {"notice"}
    assert all(incident.clip is None for incident in monitor.incidents)


def test_targets_that_cannot_be_learned_keep_the_loss_up() -> None:
    """Although it is no higher than where the run began."""
    assert retargeted(0, "noise").verdict != "healthy"


def with_large_batches(
    clip: str | None, optimizer: Callable[..., torch.optim.Optimizer], rate: float
) -> tuple[gradwatch.Monitor, str, float]:
    """Fit with a batch 30 times as large every 200 steps; return the monitor, its lines and the median of the last losses."""
    torch.manual_seed(0)
    weights = torch.randn(10, 1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    own = optimizer(model.parameters(), lr=rate)
    lines, losses = io.StringIO(), []
    with gradwatch.attach(model, report=LogReport(lines), clip=clip, strict=True) as monitor:
        for step in range(1300):
            x = torch.randn(32, 10)
            times = 30.0 if step and step % 200 == 0 else 1.0
            loss = nn.functional.mse_loss(model(times * x), times * torch.tanh(x @ weights))
            own.zero_grad()
            loss.backward()
            own.step()
            losses.append(loss.item())
    return monitor, lines.getvalue(), float(np.median(losses[-50:]))


def test_an_explosion_that_comes_back_and_overshoots_is_never_taken_for_usual() -> None:
    """After three large batches, the fourth was as large as usual: nothing was clipped, and the run was lost."""
    monitor, lines, loss = with_large_batches("norm", torch.optim.SGD, 0.02)
    assert [(one.opened_step, one.times, one.since) for one in monitor.incidents] == [
        (200 * n, n, 200) for n in range(1, 7)
    ]
    assert [one.period for one in monitor.incidents] == [None] + [200] * 5
    assert all(one.clip is not None and one.clip.clipped for one in monitor.incidents)
    assert loss < 0.05
    assert not with_large_batches(None, torch.optim.SGD, 0.02)[2] < 0.5
    assert "step 600, the 3rd time since step 200, about every 200 steps, prime suspect" in lines
    assert lines.count("|   do: Look at what comes about every 200 steps, first at step 200: an odd batch") == 1
    assert "do: as at step 400" in lines


def test_one_that_has_undone_what_was_learned_makes_all_of_them_unusual() -> None:
    """Under Adam nothing tells the fourth batch from a rare signal before it is learned from."""
    watched, clipped = (with_large_batches(clip, torch.optim.Adam, 0.01)[2] for clip in (None, "norm"))
    assert clipped < watched / 20  # 0.007 and 4.0


def test_a_rare_class_that_opened_an_explosion_each_time_is_learned() -> None:
    """Its updates are as long as the weights, but do not overshoot the loss; its recall was 0 while each was clipped."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    weight, shift = torch.tensor([1.0, 300.0]), torch.tensor([2.0, 2, 0, 0, 0, 0, 0, 0])
    with gradwatch.attach(model, report=None, clip="norm", strict=True) as monitor:
        for step in range(1600):
            x, y = torch.randn(32, 8), torch.zeros(32, dtype=torch.long)
            if step % 40 == 39:
                x[:3], y[:3] = 0.7 * torch.randn(3, 8) + shift, 1
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y, weight=weight, reduction="sum") / 32).backward()
            optimizer.step()
    assert any(incident.clip is not None for incident in monitor.incidents)
    recall = (model(0.7 * torch.randn(2000, 8) + shift).argmax(1) == 1).float().mean().item()
    assert recall > 0.9


def interrupted(bad: dict[int, str]) -> tuple[gradwatch.Monitor, str]:
    """Train a model whose input or whose loss is NaN at some steps; return the monitor and its lines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lines = io.StringIO()
    with gradwatch.attach(model, report=LogReport(lines), clip="norm", strict=True, forensics=False) as monitor:
        for step in range(max(bad) + 40):
            x = torch.randn(32, 10)
            target = 2 * x[:, :1]
            if bad.get(step) == "input":
                x[3, 2] = math.nan
            optimizer.zero_grad()
            kept = 0 if bad.get(step) == "mean over nothing" else 32  # as when a mask leaves no row
            loss = nn.functional.mse_loss(model(x)[:kept], target[:kept])
            loss.backward()
            optimizer.step()
    return monitor, lines.getvalue()


def test_steps_that_are_not_finite_again_say_which_time_it_is_and_refer_to_the_advice() -> None:
    """A bad batch every 50 steps: from the second time on with the period, since the start of the run counts as one."""
    monitor, lines = interrupted(dict.fromkeys((50, 100, 150, 200), "input"))
    first, *again = map(str, monitor.incidents)
    assert "time" not in first
    assert [one.partition(", the ")[2] for one in again] == [
        f"{nth} time since step 50, about every 50 steps" for nth in ("2nd", "3rd", "4th")
    ]
    assert lines.count("|   do: Look for log(0)") == 1
    assert lines.count("|   do: as at step 50") == 3


def test_the_times_are_all_of_the_run_whatever_was_not_finite() -> None:
    """A NaN loss without a gradient and one with, and one within the first incident; a later period is one of late."""
    bad = {40: "input", 61: "input", 230: "mean over nothing", 330: "input", 430: "mean over nothing"}
    monitor, _ = interrupted(bad)
    assert [str(one).partition(", the ")[2] for one in monitor.incidents] == [
        "",
        "3rd time since step 40",
        "4th time since step 40",
        "5th time since step 40, lately about every 100 steps",
    ]
    assert "not finite again once, last at step 61" in monitor.incidents[0].evidence


def test_times_within_an_open_incident_are_one_of_its_sentences() -> None:
    """A bad batch every ten steps leaves no time in which an incident could close."""
    monitor, _ = interrupted(dict.fromkeys(range(10, 111, 10), "input"))
    (incident,) = monitor.incidents
    assert incident.evidence[-1] == "not finite again 10 times, last at step 110, about every 10 steps"


def with_outliers(times: float) -> gradwatch.Monitor:
    """Fit with AdamW; every 200 steps, the targets of one batch are ``times`` as large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    direction = torch.randn(10, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(900):
            x = torch.randn(64, 10)
            target = torch.tanh(x @ direction) * (times if number % 200 == 199 else 1)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
    return monitor


def test_single_batches_that_come_round_are_no_new_targets() -> None:
    """The loss is back in the next step: they are counted as odd batches, each with the advice to look for what comes round."""
    spikes = [one for one in with_outliers(30).incidents if one.kind == "spike"]
    assert [one.opened_step for one in spikes] == [199, 399, 599, 799]
    assert [one.times for one in spikes] == [1, 2, 3, 4]
    assert "the 4th time since step 199, about every 200 steps" in str(spikes[-1])
    assert spikes[-1].advice[0].startswith("Look at what comes about every 200 steps, first at step 199")


def test_single_batches_that_come_round_and_ruin_the_run_are_not_healthy() -> None:
    """A routine of the program would excuse a loss that stays 50 times its level."""
    monitor = with_outliers(1000)
    level = monitor.history.loss(last=16).mean()
    assert level > 50 * monitor.history.loss()[150:199].mean()
    assert monitor.verdict != "healthy"
    grave = next(one for one in monitor.incidents if one.severity != "notice")
    assert (grave.opened_step, grave.severity, grave.verdict) == (399, "warning", "damaged")
    assert grave.advice[0].startswith("Look at what comes about every 200 steps, first at step 199")


@pytest.mark.parametrize(("period", "rate"), [(50, 3e-3), (100, 1e-3), (200, 3e-3)])
def test_values_that_are_learned_from_a_copy_are_healthy_from_the_first_copy_on(period: int, rate: float) -> None:
    """Fitted value iteration, whose loss is higher after each copy: the values grow, and so does their noise."""
    torch.manual_seed(0)
    values = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3))
    target, optimizer = copy.deepcopy(values), torch.optim.Adam(values.parameters(), lr=rate)
    with gradwatch.attach(values, report=None, strict=True) as monitor:
        for number in range(800):
            state, action = torch.rand(64, 2), torch.randint(0, 3, (64, 1))
            with torch.no_grad():
                goal = state[:, 0] + 0.9 * target(state + 0.1 * torch.randn(64, 2)).max(1).values
            optimizer.zero_grad()
            nn.functional.mse_loss(values(state).gather(1, action)[:, 0], goal).backward()
            optimizer.step()
            if number % period == period - 1:
                target.load_state_dict(values.state_dict())
        assert monitor.verdict == "healthy"
    assert {incident.severity for incident in monitor.incidents} <= {"notice"}


def test_odd_batches_that_come_round_are_no_notice_while_what_was_learned_is_undone() -> None:
    """A target of 10,000 every 40 steps holds the loss at several times its level, which one batch alone does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(600):
            x = torch.randn(64, 8)
            y = 3 * x[:, :1] + torch.sin(3 * x[:, 1:2])
            if number >= 200 and number % 40 == 0:
                y[0] = 1e4
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        level = monitor.history.loss(last=16).mean()
    assert level > 2 * np.median(monitor.history.loss()[170:200])
    assert monitor.verdict == "damaged"
    last = [one for one in monitor.incidents if one.severity == "warning"][-1]
    assert last.times >= 3
    assert last.advice[0].startswith("Look at what comes about every 40 steps")
