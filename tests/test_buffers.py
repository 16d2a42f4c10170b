"""Buffers that are not finite, although all losses and gradients are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.offline.replay import replay
from gradwatch.runlog import RunLog
from tests.trainings import data

if TYPE_CHECKING:
    from pathlib import Path


def step_of(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step of a loop."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_buffers_that_a_left_out_batch_has_made_nan_are_told(tmp_path: Path) -> None:
    """All losses and gradients that the optimizer used are finite; a replay of the run log says the same."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True, log=tmp_path / "run") as monitor:
        for number in range(300):
            loss = nn.functional.mse_loss(model(x * (math.nan if number == 150 else 1)), y)
            if loss.isfinite():
                step_of(optimizer, loss)
        assert "is over, with damage: buffer 1.running_mean holds 16 NaN" in monitor.checkpoint_guard().reason
        model[1].reset_running_stats()  # type: ignore[operator]
        for _ in range(40):
            step_of(optimizer, nn.functional.mse_loss(model(x), y))
        assert monitor.verdict == "healthy"
        assert monitor.checkpoint_guard()
    (incident,) = monitor.incidents
    assert incident.verdict == "resolved"
    assert incident.advice[0].startswith("Leave batches with NaN or infinity out before the forward pass")
    log = RunLog(tmp_path / "run")
    again = replay(log.history(), log.rows(), log.rules()[0])
    assert [(one.opened_step, one.signs[0].code) for one in again.incidents] == [(incident.opened_step, "GW307")]


def test_a_mask_that_comes_with_the_first_batch_is_no_damage() -> None:
    """A buffer of minus infinity that the model registers in its forward pass."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            if "mask" not in dict(self.named_buffers()):
                self.register_buffer("mask", torch.full((8, 8), -math.inf).triu(1))
            told: Tensor = self.out(torch.softmax(x.T @ x + self.get_buffer("mask"), -1) @ x.T)
            return told

    torch.manual_seed(0)
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(80):
            step_of(optimizer, model(torch.randn(8, 8)).square().mean())
    assert not any(alarm.code == "GW307" for alarm in monitor.alarms)
