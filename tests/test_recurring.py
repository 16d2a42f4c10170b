"""Jumps that come back with a period: one story, a routine of the program unless they grow."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.reports.log import LogReport
from gradwatch.verdict.recurring import Recurrence, Recurring


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
