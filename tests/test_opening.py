"""Advice goes by what was known at the opening: the rate then, the weights then, and which of them are too large."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwatch
from tests.test_rule_trainings import decay_too_high
from tests.trainings import data, mlp, train


def noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (256, 8) and a target (256, 1) of which they tell nothing."""
    x, _ = data()
    return x, torch.randn(256, 1, generator=torch.Generator().manual_seed(1))


def advice(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[str]:
    """Train on one batch; return the advice of the first incident that is more than a notice."""
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        return list(next(one for one in monitor.incidents if one.severity != "notice").advice)


def test_weights_that_are_all_too_large_are_initialised_anew_before_anything_else() -> None:
    """A large first loss is their doing, not that of the targets."""
    model = mlp(depth=6)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=3.0)
    first, second, *_ = advice(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert first.startswith("Initialise the weights anew, by He or Xavier: for their number of inputs, they are ")
    assert second.startswith("Lower the learning rate: ")


def test_a_single_matrix_that_is_too_large_is_named() -> None:
    """Compared with the median one."""
    model = mlp(depth=4)
    with torch.no_grad():
        model[2].weight.mul_(300.0)  # type: ignore[operator]
    assert advice(model, torch.optim.SGD(model.parameters(), lr=0.05))[0].startswith("Initialise 2.weight anew: ")


@pytest.mark.parametrize(("rate", "lowest", "highest"), [(5.0, 0.005, 1.0), (500.0, 0.005, 20.0)])
def test_the_number_to_try_comes_from_the_update_that_began_it(rate: float, lowest: float, highest: float) -> None:
    """Not from those of the explosion, which are longer by orders of magnitude."""
    model = mlp()
    first = advice(model, torch.optim.SGD(model.parameters(), lr=rate))[0]
    assert first.startswith("Lower the learning rate: ")
    assert lowest < float(first.split()[4]) < highest


def test_a_rate_that_has_risen_is_told_with_its_rise() -> None:
    """It is the schedule that is to be checked."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.2)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    line = advice(model, optimizer, steps=150)[0]
    assert line.startswith("The learning rate has risen from 0.001 to ")
    assert "check its schedule, and keep it below " in line


def test_a_rate_at_which_nothing_moves_is_to_be_raised() -> None:
    """To the one at which an update would change a thousandth of the layer."""
    model = mlp()
    first = advice(model, torch.optim.SGD(model.parameters(), lr=1e-12), steps=120)[0]
    assert first.startswith("Raise the learning rate: ")
    assert float(first.split()[4]) > 1e-4


def test_a_layer_that_was_never_alive_is_initialised_anew() -> None:
    """No step has killed it."""
    model = mlp(depth=3)
    nn.init.constant_(model[0].bias, -100.0)  # type: ignore[arg-type]
    lines = advice(model, torch.optim.SGD(model.parameters(), lr=1e-3), steps=60)
    assert lines[0].startswith("Initialise 0 anew, with biases at zero: 0.")


def test_a_weight_decay_below_zero_is_the_first_advice_on_weights_that_run_away() -> None:
    """It is a note from the first step on."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["weight_decay"] = -5.0
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(200):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if step == 0:
                assert any("weight decay of a parameter group is -5" in note for note in monitor.notes)
        grave = next(one for one in monitor.incidents if one.severity != "notice")
        assert grave.advice[0].startswith("The weight decay of a parameter group is -5")


def test_what_overwrites_the_weights_is_named_with_a_number_to_try() -> None:
    """The decay where it takes more than an update should; else the rate."""
    (one,) = decay_too_high(faulty=True).incidents
    assert one.advice[0].startswith("Lower the weight decay: 0.01 instead of 10. An update may change ")
    model = mlp(activation=nn.Tanh)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, torch.optim.AdamW(model.parameters(), lr=0.1), 300, x_y=noise())
    one = next(one for one in monitor.incidents if any(sign.code == "GW406" for sign in one.signs))
    assert one.advice[0].startswith(
        "Lower the learning rate: 0.03 instead of 0.1. An update may change 11 % of the weights"
    )


def test_weights_that_moved_farther_than_rate_and_gradients_explain_are_told_first() -> None:
    """A momentum buffer that comes back scaled; after a step that the gradients explain, nothing of it is said."""
    for scaled in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            train(model, optimizer, 100)
            for state in optimizer.state.values():
                state["momentum_buffer"].mul_(1024 if scaled else 1)
            optimizer.param_groups[0]["lr"] *= 1 if scaled else 100
            train(model, optimizer, 10)
        told = next(one for one in monitor.incidents if one.severity != "notice").advice
        assert told[0].startswith("Look at what changed the weights just before step 101: ") == scaled
        assert not (scaled and any(line.startswith("Look at the batch") for line in told))
