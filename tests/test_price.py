"""Keeping the inputs of each step must be worth its time, which is decided after the first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.forensics.price import Price


@pytest.mark.parametrize(
    ("step", "took", "share", "too_high"),
    [
        (1e-3, 1e-4, None, False),
        (1e-4, 1e-6, None, True),
        (1e-1, 1e-4, 0.01, False),
        (1e-2, 1e-4, 0.01, True),
        (1e-2, 1e-4, 0.5, False),
        (1e-4, 1e-9, 0.5, True),
    ],
    ids=[
        "no budget",
        "too short",
        "long step",
        "half of the budget is exceeded",
        "ample budget",
        "too short all the same",
    ],
)
def test_it_may_take_half_of_the_budget_in_steps_that_are_not_short(
    step: float, took: float, share: float | None, too_high: bool
) -> None:
    """The forward is half of each step; one step in three is ten times as long and costs ten times as much."""
    price, now = Price(share), 0.0
    while not price.known:
        longer = 10 if int(now / step) % 3 == 2 else 1
        price.add(now, longer * step / 2, longer * took)
        now += longer * step
    assert price.too_high is too_high


def kept_after(steps: int, **settings: Any) -> bool:
    """Train a network with steps of some milliseconds; return whether the inputs of its steps are still kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(256, 256)
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert monitor._inspector is not None
        return monitor._inspector._capture.installed


def test_a_budget_that_leaves_no_time_for_it_ends_it_and_one_that_does_not() -> None:
    """Without a budget, and where the user asks for it, it goes on."""
    assert kept_after(30)
    assert not kept_after(30, budget=1e-9)
    assert kept_after(30, budget=0.9)
    assert kept_after(30, budget=1e-9, forensics=True)
