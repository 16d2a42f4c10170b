"""A time budget chooses how often to measure; in between, one gradient and the loss are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.probe import budget
from gradwatch.probe.budget import Budget
from tests.trainings import data, mlp


@pytest.mark.parametrize(
    ("row", "step", "every"), [(1e-4, 0.1, 1), (1e-4, 1e-3, 10), (1e-4, 1e-6, 64)], ids=["slow step", "quick", "tiny"]
)
def test_a_row_that_costs_more_than_its_share_is_made_less_often(
    row: float, step: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may take a hundredth of the time of the steps between it and the next."""
    now = 0.0
    monkeypatch.setattr(budget, "perf_counter", lambda: now)
    chooser, steps, seconds, chosen = Budget(0.01), 0, 0.0, 1
    for rows in range(200):
        chosen = chooser.every(seconds, steps, rows)
        steps, seconds, now = steps + chosen, seconds + row, now + chosen * step + row
    assert chosen == every


def train(steps: int, wild: int | None = None, **settings: Any) -> gradwatch.Monitor:
    """Train; the loss of step ``wild`` is a thousand times too large."""
    torch.manual_seed(0)
    model = mlp(depth=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), y) * (1e3 if step == wild else 1)).backward()
            optimizer.step()
    return monitor


def test_a_tiny_budget_leaves_few_rows_after_the_first_64() -> None:
    """With less time than a row takes, one in 64 steps is measured."""
    steps = train(1000, budget=1e-9).history.steps()
    assert steps[:64].tolist() == list(range(64))
    assert len(steps) < 64 + 16 + 1000 / 32
    assert np.diff(steps)[-1] == 64


def test_an_ample_budget_measures_each_step() -> None:
    """Or nearly each: at least twice as many as a budget that is no budget."""
    ample, tiny = (len(train(300, budget=share).history.steps()) for share in (0.999, 1e-9))
    assert ample > 2 * tiny


@pytest.mark.parametrize("settings", [{"budget": 1e-9}, {"every": 7}], ids=str)
def test_a_wild_step_in_between_is_measured(settings: dict[str, Any]) -> None:
    """The step itself, though it was not its turn."""
    calm = set(train(900, **settings).history.steps().tolist())
    wild = next(step for step in range(700, 900) if step not in calm)
    assert wild in train(900, wild=wild, **settings).history.steps()
