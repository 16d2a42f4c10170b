"""The user's own clips in the wrong place: the numbers are right all the same, and the mistake is reported once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import device
from tests.trainings import data, mlp

LATE = "your clip comes after optimizer.step()"
SCALED = "your clip comes before scaler.unscale_(optimizer)"


def norm_of(model: nn.Module, scale: float = 1.0) -> float:
    """The global norm of the gradients without the loss scale."""
    return math.sqrt(
        sum((p.grad.double() / scale).square().sum().item() for p in model.parameters() if p.grad is not None)
    )


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("by", ["norm", "value", "parts"])
def test_norms_are_without_the_loss_scale_though_the_clip_came_before_unscaling(
    by: str, *, fused: bool, unscale: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share that the clip left is right too, and the note says by what the bound is compared."""
    if where == "device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms, left = [], []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(100):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            norms.append(norm_of(model, 1024))
            if by == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            elif by == "value":
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            else:
                total = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, total)
            left.append(norm_of(model, 1024))
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert monitor.history.global_norm().tolist() == pytest.approx(norms, rel=1e-5)
    shares = [after / before for after, before in zip(left, norms, strict=True)]
    assert monitor.history.clip_coefficient().tolist() == pytest.approx(shares, rel=1e-4)
    (note,) = [note for note in monitor.notes if note.startswith(SCALED)]
    if where == "cpu":
        assert "the loss scale (1,024)" in note
    if where == "cpu" and by == "norm":
        assert "its bound of 0.5 is compared" in note
        assert "it acts like 4.88e-4" in note


@pytest.mark.parametrize("measures", ["after unscaling", "only"])
def test_a_clip_in_its_place_and_a_norm_that_is_only_measured_are_no_mistake(measures: str) -> None:
    """A bound of infinity clips nothing."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if measures == "only":
                nn.utils.clip_grad_norm_(model.parameters(), math.inf)
                nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            scaler.unscale_(optimizer)
            norm = norm_of(model)
            if measures != "only":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if measures == "only":
                nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            assert monitor.history.global_norm(last=1)[0] == pytest.approx(norm, rel=1e-5)
        assert not monitor.notes


@pytest.mark.parametrize("by", ["norm", "value"])
def test_a_clip_after_the_step_is_reported_once_at_the_first_step(by: str) -> None:
    """It changes gradients that the step has already used."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            norm = norm_of(model)
            optimizer.step()
            if by == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            assert sum(note.startswith(LATE) for note in monitor.notes) == 1
            assert monitor.history.global_norm(last=1)[0] == pytest.approx(norm, rel=1e-5)
            assert monitor.history.clip_coefficient(last=1)[0] == 1


def test_gradients_that_no_step_has_used_are_never_clipped_too_late() -> None:
    """Put into place by hand, of the other optimizer, accumulated, or of a step that the user announces."""
    x, y = data()

    def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parts = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), parts, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    for loop in (by_hand, accumulated):
        model = mlp()
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(8):
                loop(model, optimizer)
            assert not [note for note in monitor.notes if note.startswith(LATE)]
    model = mlp()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(8):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            monitor.step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.01)
        assert not [note for note in monitor.notes if note.startswith(LATE)]


def test_one_of_two_optimizers_whose_gradients_are_fresh_keeps_the_clip_in_time() -> None:
    """A clip of all parameters between the steps of two optimizers acts on the second one."""
    model, (x, y) = mlp(), data()
    parameters = list(model.parameters())
    one, other = torch.optim.SGD(parameters[:2], lr=0.01), torch.optim.SGD(parameters[2:], lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(8):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            one.step()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            other.step()
        assert not [note for note in monitor.notes if note.startswith(LATE)]


@pytest.mark.parametrize("early", [True, False])
def test_a_clip_before_backward_is_told_once(*, early: bool) -> None:
    """It finds no gradient, so that nothing is clipped; where a second clip comes after backward, nothing is wrong."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(40):
            optimizer.zero_grad()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.functional.mse_loss(model(x), y).backward()
            if not early:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert sum("your clip comes before backward()" in note for note in monitor.notes) == early
    assert (monitor.history.clip_coefficient() < 1).any() != early
