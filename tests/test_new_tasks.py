"""What a user changes in the middle of a run is visible: a head, an optimizer, a model that was good already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradwatch


def net() -> nn.Sequential:
    """A small classifier."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, labels: Tensor | None = None) -> None:
    """Train on fresh batches."""
    labels = torch.arange(5) if labels is None else labels
    for _ in range(steps):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels[x[:, :5].argmax(1)]).backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["replaced", "reset", "alone"])
def test_a_new_head_with_a_new_optimizer_is_a_new_task(how: str) -> None:
    """Its loss is no divergence of the old one."""
    model = net()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), 300)
        if how == "reset":
            model[2].reset_parameters()  # type: ignore[operator]
        else:
            model[2] = nn.Linear(64, 5)
        if how == "alone":
            model[0].requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fit(model, torch.optim.Adam(trained, lr=3e-3), 200, torch.tensor([3, 1, 4, 0, 2]))
        assert not [incident for incident in monitor.incidents if incident.severity != "notice"]
        assert monitor.verdict == "healthy"
        told = [note for note in monitor.notes if note.startswith("a new optimizer makes its first step at step 300")]
        assert len(told) == (how == "reset")  # where layers came, their columns are the new task


def test_a_rate_far_too_high_of_a_new_optimizer_is_still_an_explosion() -> None:
    """Its first loss is the old one's, so no new task begins."""
    model = net()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), 300)
        fit(model, torch.optim.SGD(model.parameters(), lr=1e3), 30)
        assert [incident for incident in monitor.incidents if incident.severity != "notice"]
        assert monitor.verdict != "healthy"


def test_a_model_that_was_good_from_the_first_step_has_traction() -> None:
    """A cross-entropy far below guessing is not poor; elsewhere the advice says what it may be."""
    model = net()
    fit(model, torch.optim.Adam(model.parameters(), lr=3e-3), 1500)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        fit(model, torch.optim.Adam(model.parameters(), lr=1e-6), 300)
        assert not monitor.incidents
    regression = nn.Linear(8, 1)
    nn.init.zeros_(regression.weight)
    with gradwatch.attach(regression, report=None, strict=True) as monitor:
        optimizer = torch.optim.SGD(regression.parameters(), lr=1e-3)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.mse_loss(regression(torch.randn(64, 8)), torch.randn(64, 1)).backward()
            optimizer.step()
        assert monitor.incidents[0].severity == "notice"
        assert "good from the first step" in monitor.incidents[0].advice[0]  # the one that is shown
