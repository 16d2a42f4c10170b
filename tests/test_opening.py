"""Advice goes by what was known at the opening: the rate then, the weights then, and which of them are too large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import gradwatch
from tests.test_rule_trainings import decay_too_high
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
    assert second.startswith("Clip by norm when it happens: ")
    assert "No usual learning rate bears such gradients. At 0.01, the first update alone is " in second


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
    assert lines[0].startswith("Initialise module 0 anew, with biases at zero: 0.")


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


def test_a_rate_that_is_too_high_with_any_decay_is_lowered_before_the_decay() -> None:
    """The decay takes 2 % of the weights in each step, and the rate alone more than a tenth."""
    model = mlp(activation=nn.Tanh)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2), 300, x_y=noise())
    one = next(one for one in monitor.incidents if any(sign.code == "GW406" for sign in one.signs))
    assert any(line.startswith("Lower the learning rate: ") for line in one.advice)
    assert not any("weight decay" in line for line in one.advice)


def test_a_rate_at_which_a_stalled_loss_hardly_moves_is_to_be_raised() -> None:
    """Where no layer is the suspect, the largest matrix is the measure; the summary says so although it is a notice."""
    model = mlp()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, torch.optim.Adam(model.parameters(), lr=1e-7), 300)
    (one,) = monitor.incidents
    assert (one.kind, one.severity) == ("stalled", "notice")
    assert one.advice[0].startswith("Raise the learning rate: ")
    assert "a thousandth of 2.weight" in one.advice[0]
    assert f"do: {one.advice[0]}" in str(monitor.summary())


def test_the_advice_goes_by_the_optimizer_of_the_step_that_began_it() -> None:
    """SGD at far too high a rate beside Adam: it is not Adam that divides gradients by their own size."""
    model, (x, y) = mlp(depth=2), data()
    sgd = torch.optim.SGD(model[0].parameters(), lr=300.0)
    adam = torch.optim.Adam(model[2].parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(30):
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            sgd.step()
            adam.step()
    first, second, *_ = monitor.incidents[0].advice
    assert first.startswith("Lower the learning rate")
    assert second.startswith("Clip by norm")


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


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.02),
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
    ],
)
def test_a_rate_that_was_raised_at_once_comes_before_the_batch(
    optimizer_of: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """It was raised in a step that was not judged; nothing is said of what else may have moved the weights."""
    model = mlp()
    optimizer = optimizer_of(model.parameters())

    def raise_it(step: int) -> None:
        optimizer.param_groups[0]["lr"] *= 100 if step == 150 else 1

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 170, each=raise_it)
    told = next(one for one in monitor.incidents if one.severity != "notice").advice
    assert told[0] == (
        "The learning rate was raised from 0.02 to 2 at step 150: check its schedule, and go back to 0.02, which the run had "
        "borne until then."
    )
    assert not any("Look at" in line for line in told)


def test_a_burst_of_the_rate_of_one_group_is_named_after_it_is_over() -> None:
    """For two steps, one of three groups steps at 2,500 times its rate, and the explosion is seen in the step after them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 32), "b": nn.Linear(5, 32), "head": nn.Linear(64, 5)})
    optimizer = torch.optim.Adam([{"params": part.parameters()} for part in model.values()], lr=2e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(80):
            optimizer.param_groups[1]["lr"] = 5.0 if step in (60, 61) else 2e-3
            x = torch.randn(64, 10)
            hidden = torch.cat([model["a"](x[:, :5]), model["b"](x[:, 5:])], 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model["head"](hidden.relu()), x[:, :5].argmax(1)).backward()
            optimizer.step()
    grave = next(one for one in monitor.incidents if one.severity != "notice")
    assert grave.opened_step > 61
    assert grave.advice == ("Look at what sets the learning rate: it was 5 at steps 60 to 61, and 0.002 after them.",)


def test_rates_of_optimizers_that_take_turns_were_not_raised() -> None:
    """One is a hundred times the other from the beginning on."""
    model = mlp(depth=2)
    slow = torch.optim.SGD(model[0].parameters(), lr=2e-3)
    fast = torch.optim.SGD(model[2].parameters(), lr=0.2)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(120):
            for optimizer in (slow, slow, fast):
                model.zero_grad()
                nn.functional.mse_loss(model(x), y * (1e4 if step > 100 else 1)).backward()
                optimizer.step()
    grave = next(one for one in monitor.incidents if one.severity != "notice")
    assert not any("was raised" in line for line in grave.advice)


def test_a_gradient_that_surges_in_one_step_is_clipped_before_the_rate_is_lowered() -> None:
    """The run has borne its rate for long, which is not blamed."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def surge(step: int) -> None:
        for parameter in model.parameters() if step == 100 else ():
            assert parameter.grad is not None
            parameter.grad.mul_(1e5)

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 110, each=surge)
    first, *rest = monitor.incidents[0].advice
    assert first.startswith('Clip by norm when it happens: attach(model, clip="norm"). In one step, the gradient of ')
    assert "at a learning rate that the run had borne until then." in first
    assert not any("learning rate" in line for line in rest)


def test_a_rate_to_try_is_known_from_the_first_update_alone() -> None:
    """It overshoots, and only the third one is far too long."""
    x, y = data()
    model = mlp(depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).exp(), 2 + y).backward()
            optimizer.step()
    told = next(one for one in monitor.incidents if one.severity != "notice").advice[0]
    norms, weights = monitor.history.grad_norm()[0], monitor.history.weight_norm()[0]
    least = min(0.1 * max(weights[i], monitor.history.half_usual[i]) / norms[i] for i in (0, 2))
    assert told.startswith("Lower the learning rate: ")
    assert float(told.split()[4]) == pytest.approx(least, rel=0.5)
    assert "At 1, the first update alone is " in told


def test_weights_that_are_all_zero_are_initialised_anew() -> None:
    """All of them: none of their gradients passes the others."""
    model = mlp(depth=3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    first = advice(model, torch.optim.SGD(model.parameters(), lr=0.01), steps=60)[0]
    assert first.startswith(
        "Initialise the weights anew, by He or Xavier: those of 0.weight, 2.weight, 4.weight are all zero"
    )


def test_weights_that_are_all_too_small_are_initialised_anew() -> None:
    """Before activations are replaced."""
    model = mlp(depth=8, activation=nn.Tanh)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter, 0.1)
    first = advice(model, torch.optim.SGD(model.parameters(), lr=0.01), steps=200)[0]
    assert first.startswith("Initialise the weights anew, by He or Xavier: for their number of inputs, they are 0.")


def test_saturated_units_want_scaled_inputs() -> None:
    """A tanh far from zero passes no gradient, and no ReLU is blamed."""
    x, y = data()
    model = mlp(activation=nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 200, x_y=(1e4 * (2 + x), y))
    told = next(one for one in monitor.incidents if one.kind == "dead").advice
    assert told[0].startswith("Scale the inputs to zero mean and unit variance")
    assert not any("ReLU" in line for line in told)


def test_weights_that_never_change_are_told_apart_by_who_holds_them() -> None:
    """No optimizer, or one whose eps takes the gradient away."""
    model = mlp()
    optimizer = torch.optim.SGD(list(model.parameters())[:2], lr=0.05)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 80)
    (only,) = monitor.incidents[0].advice
    assert only.startswith(
        "Build the optimizer from model.parameters() after the model is final: none that made a step holds "
    )
    model = mlp()
    faint = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, faint, 80, loss_of=lambda p, q: 1e-20 * nn.functional.mse_loss(p, q))
    told = next(one for one in monitor.incidents if one.kind == "frozen").advice
    assert any("Adam adds its eps of 1e-8 before it divides" in line for line in told)
    assert not any("Build the optimizer" in line or "half-precision" in line for line in told)


def test_what_an_explosion_has_left_is_not_advised_on_alone() -> None:
    """Neither labels nor the first weights are to blame for a loss that hangs where an explosion has left it."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = x[:, :5].argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def raise_it(step: int) -> None:
        optimizer.param_groups[0]["lr"] *= 1000 if step == 150 else 1

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, 320, each=raise_it, loss_of=nn.functional.cross_entropy, x_y=(x, y))
    cause, *later = monitor.incidents
    assert cause.kind == "exploding"
    assert {one.kind for one in later} == {"dead"}  # that the loss hangs is told with the explosion
    for one in later:
        assert one.advice == (
            f"Go back to a checkpoint from before step {cause.opened_step}, and follow the advice on the incident that opened at "
            f"step {cause.opened_step} (exploding): it has probably left this behind.",
        )


def test_a_surge_is_seen_although_another_optimizer_steps_in_between() -> None:
    """One batch of one of two nets: its rate is not blamed."""
    torch.manual_seed(0)
    nets = nn.ModuleDict({name: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1)) for name in "ab"})
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.02) for name, net in nets.items()}
    direction = torch.randn(10, 1)
    with gradwatch.attach(nets, report=None, strict=True) as monitor:
        for number in range(220):
            for name, net in nets.items():
                x = torch.randn(64, 10)
                target = x @ direction * (300 if (number, name) == (200, "a") else 1)
                optimizers[name].zero_grad()
                nn.functional.mse_loss(net(x), target).backward()
                optimizers[name].step()
    incident = next(one for one in monitor.incidents if one.severity != "notice")
    assert incident.opened_step == 400
    assert "In one step, the gradient of a." in incident.advice[0]
    assert not any("Lower the learning rate" in line for line in incident.advice)


def test_an_eps_far_above_the_gradients_is_named() -> None:
    """Each update is then as short as at a rate a thousand times lower."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=100.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
    assert monitor.incidents[0].advice[0].startswith("Lower eps: 1e-8 instead of 100.")


def test_averages_of_adam_that_let_updates_grow_are_named_before_the_rate() -> None:
    """At the usual averages, the same rate trains it."""
    found = {}
    for betas in ((0.9, 0.1), (0.9, 0.999)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=betas)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(200):
                x = torch.randn(32, 8)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
                optimizer.step()
        found[betas] = [one for one in monitor.incidents if one.severity != "notice"]
    assert found[(0.9, 0.1)][0].advice[0].startswith("Set betas to (0.9, 0.999) instead of (0.9, 0.1): Adam forgets")
    assert found[(0.9, 0.999)] == []
