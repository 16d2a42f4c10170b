"""Words that are true when they are said: trainings with a fault that is known, and what they are told of it."""

from __future__ import annotations

import torch
from torch import nn

import gradwatch


def mlp(outputs: int = 1, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Two layers of 32 units, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, outputs))


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Make one step of a loop, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def advice(monitor: gradwatch.Monitor) -> str:
    """All advice on all incidents, as one text."""
    return " ".join(line for incident in monitor.incidents for line in incident.advice)


def test_weights_that_a_nan_has_damaged_are_not_its_origin() -> None:
    """The next step finds NaN in them, which is what the first left: there is one more thing to do, and the batch stays named."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(80):
            x = torch.randn(32, 8)
            if number == 40:
                x[3, 2] = torch.nan
            step(optimizer, nn.functional.mse_loss(model(x), torch.ones(32, 1)))
        (incident,) = monitor.incidents
        assert (incident.kind, incident.opened_step) == ("nonfinite", 40)
        assert incident.origin is None or incident.origin.step == 40
        assert "was not finite before the forward" not in str(monitor.summary())
        assert any("NaN in the batch" in line or "where they are loaded" in line for line in incident.advice)
        assert "Go back to a checkpoint from before step 40: weights hold NaN or infinity since step 41" in advice(
            monitor
        )


def test_a_target_that_holds_nan_is_named_in_the_advice() -> None:
    """Not "look at where it is made", which leaves open what."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(60):
            x, y = torch.randn(32, 8), torch.ones(32, 1)
            y[3] = torch.nan if number == 50 else 1.0
            step(optimizer, nn.functional.mse_loss(model(x), y))
        assert monitor.incidents[0].advice[0] == (
            "Look at where the `target` of `mse_loss` is made: it holds values that are not finite."
        )


def test_no_second_weight_decay_is_advised() -> None:
    """AdamW has one."""
    for decay in (0.01, 0.0):
        model = mlp(5, nn.ReLU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.0, weight_decay=decay)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(20):
                x = torch.randn(64, 8)
                step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
            assert ("L2 penalty" in advice(monitor)) is (decay == 0)
