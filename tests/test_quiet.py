"""The short way through a step leaves the same numbers as the long way, and gives way to it."""

# ruff: noqa: ARG001  changes take all that one of them may need

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.probe.step_recorder import StepRecorder
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 200


def train(change: Any, clip_at: float | None = None, accumulate: int = 1, **settings: Any) -> dict[str, Any]:
    """Train; ``change`` may act on anything before each backward. Return all that was recorded, and the parameters."""
    torch.manual_seed(0)
    model = mlp(depth=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = data()
    ways = []
    monitor = gradwatch.attach(model, report=None, strict=True, **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(accumulate):
            rows = torch.randint(0, len(x), (16,))
            loss = nn.functional.mse_loss(model(x[rows]), y[rows]) / accumulate
            change(step, model, optimizer, loss).backward()
        if clip_at is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_at)
        before = monitor._probe.recorder._fast_path
        optimizer.step()
        ways.append(before is not None and monitor._probe.recorder._fast_path is before)
    history = monitor.history
    found = {
        "grad": history.grad_norm(),
        "weight": history.weight_norm(),
        "loss": history.loss(),
        "norm": history.global_norm(),
        "coefficient": history.clip_coefficient(),
        "steps": history.steps(),
        "typical": history.typical_grad.value,
        "losses": history.losses,
        "row": history.row.grad_norm,
        "alarms": list(map(str, monitor.alarms)),
        "incidents": [(i.kind, i.opened_step, i.closed_step) for i in monitor.incidents],
        "ways": ways,
        "parameters": [parameter.detach().clone() for parameter in model.parameters()],
    }
    monitor.detach()
    return found


def nothing(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """An ordinary training."""
    return loss


def spike(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One wild batch in the middle of a stretch."""
    return loss * (1e4 if step == 150 else 1)


def nan(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One batch without a finite gradient."""
    return loss * (math.nan if step == 150 else 1)


def schedule(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """Another learning rate at each step."""
    optimizer.param_groups[0]["lr"] = 1e-3 * 0.99**step
    return loss


def freeze(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """A layer stops to get gradients, and gets them again."""
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(step < 120 or step > 170)
    return loss


def fade(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """Gradients of zero for some steps."""
    return loss * (0.0 if 130 <= step < 137 else 1.0)


@pytest.mark.parametrize("settings", [{}, {"clip": "norm"}, {"every": 2}, {"accumulate": 2}, {"clip_at": 0.1}], ids=str)
@pytest.mark.parametrize("change", [nothing, spike, nan, schedule, freeze, fade])
def test_both_ways_record_the_same(
    change: Callable[..., Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, typical norms, alarms, incidents and parameters; where the user clips, to the last digits."""
    short = train(change, **settings)
    monkeypatch.setattr(StepRecorder, "_enter_fast_path", lambda *_, **__: None)
    long = train(change, **settings)
    assert any(short.pop("ways"))
    assert not any(long.pop("ways"))
    for name, expected in long.items():
        if name == "parameters":
            for mine, other in zip(short[name], expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
        elif isinstance(expected, np.ndarray):
            np.testing.assert_allclose(
                short[name], expected, rtol=1e-6 if name == "coefficient" else 1e-12, err_msg=name
            )
        else:
            assert short[name] == expected, name


@pytest.mark.parametrize("clip_at", [None, 0.1])
def test_most_steps_of_a_healthy_training_go_the_short_way(clip_at: float | None) -> None:
    """Fourteen of sixteen at least, once the first 64 are over."""
    assert sum(train(nothing, clip_at)["ways"][64:]) / (STEPS - 64) > 14 / 16


@pytest.mark.parametrize("clip_at", [0.01, 1e9])
def test_a_shared_norm_changes_no_bit_of_the_users_clip(clip_at: float) -> None:
    """Neither the parameters nor the norm that `clip_grad_norm_` returns."""

    def run(*, watched: bool) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        monitor = gradwatch.attach(model, report=None, strict=True) if watched else None
        norms, shared = [], 0
        for _ in range(100):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip_at))
            shared += monitor is not None and (path := monitor._probe.recorder._fast_path) is not None and path.shared
            optimizer.step()
        if monitor is not None:
            assert shared > 20
            monitor.detach()
        return [*norms, *model.parameters()]

    assert all(map(torch.equal, run(watched=True), run(watched=False)))
