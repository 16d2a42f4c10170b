"""Every rule fires on a real training made for it, and is quiet on that training's repaired twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.faults.models import Gates
from gradwatch.rules import RULES
from tests.trainings import data, mlp, train

if TYPE_CHECKING:
    from pathlib import Path

Training = Callable[[bool], gradwatch.Monitor]


def watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    each: Callable[[int], None] | None = None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    x_y: tuple[Tensor, Tensor] | None = None,
) -> gradwatch.Monitor:
    """Train under a monitor that raises its own errors."""
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, optimizer, steps, each=each, loss_of=loss_of, x_y=x_y)
    return monitor


def rate_of_nothing(faulty: bool) -> gradwatch.Monitor:
    """A learning rate of 1e-7 against one of 0.1."""
    model = mlp()
    return watched(model, torch.optim.SGD(model.parameters(), lr=1e-7 if faulty else 0.1), 300)


def rate_too_high(faulty: bool) -> gradwatch.Monitor:
    """A learning rate that doubles each step from step 60 on, against one that stays."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def schedule(step: int) -> None:
        if faulty and step >= 60:
            optimizer.param_groups[0]["lr"] *= 2

    return watched(model, optimizer, 90, each=schedule)


def logarithm_of_zero(faulty: bool) -> gradwatch.Monitor:
    """A loss with log(0) in it, against one with a floor."""
    model = mlp()

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return (
            nn.functional.mse_loss(output, target)
            - 0.01 * torch.log(torch.relu(output - 100) + (0 if faulty else 1e-3)).mean()
        )

    return watched(model, torch.optim.SGD(model.parameters(), lr=0.01), 20, loss_of=loss_of)


def root_of_zero(faulty: bool) -> gradwatch.Monitor:
    """A penalty with sqrt(0): its value is finite, its gradient is not; against one with a floor."""
    model = mlp()

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        penalty = torch.sqrt((0 * output).square().sum() + (0 if faulty else 1e-6))
        return nn.functional.mse_loss(output, target) + penalty

    return watched(model, torch.optim.SGD(model.parameters(), lr=0.01), 20, loss_of=loss_of)


def wrong_sign(faulty: bool) -> gradwatch.Monitor:
    """A loss that is maximised step by step, against one that is minimised."""
    model = mlp()
    sign = -1 if faulty else 1

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return sign * nn.functional.mse_loss(output, target)

    return watched(model, torch.optim.Adam(model.parameters(), lr=0.01), 200, loss_of=loss_of)


def smaller_targets(faulty: bool) -> gradwatch.Monitor:
    """Targets a fifth smaller from step 150 on, at a rate that has fallen to nothing, against targets that stay."""
    x, _ = data()
    y = x[:, :1] - x[:, 1:2]
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 if step < 150 else 1e-6
        y.mul_(0.8 if faulty and step == 150 else 1)

    return watched(model, optimizer, 250, each=change, x_y=(x, y))


def forgotten(faulty: bool) -> gradwatch.Monitor:
    """Weights that fade away over a hundred steps, at a rate that has fallen to nothing, against weights that stay."""
    x, _ = data()
    y = x[:, :1] - x[:, 1:2]
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def fade(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.01 if step < 100 else 1e-6
        if faulty and 100 <= step < 200:
            for parameter in model.parameters():
                parameter.data.mul_(0.95)

    return watched(model, optimizer, 350, each=fade, x_y=(x, y))


def unscaled_targets(faulty: bool) -> gradwatch.Monitor:
    """Targets in the hundreds, against scaled ones."""
    x, y = data()
    model = mlp()
    return watched(model, torch.optim.SGD(model.parameters(), lr=0.05), 20, x_y=(x, y * 300 if faulty else y))


def adam_rate(faulty: bool) -> gradwatch.Monitor:
    """Adam with a rate of 3, against 0.003."""
    model = mlp()
    return watched(model, torch.optim.Adam(model.parameters(), lr=3.0 if faulty else 0.003), 40)


def one_bad_batch(faulty: bool) -> gradwatch.Monitor:
    """Inputs a hundred times too large at step 50, against none."""
    x, y = data()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def spoil(step: int) -> None:
        x.mul_(100 if faulty and step == 49 else 1)
        x.div_(100 if faulty and step == 52 else 1)

    return watched(model, optimizer, 70, each=spoil, x_y=(x, y))


def large_gates(faulty: bool) -> gradwatch.Monitor:
    """Gated layers that double what comes back, under a clip, against layers of a usual initialisation.

    At larger rates the loss of the former jumps about, differently on each processor.
    """
    torch.manual_seed(0)
    model = Gates(2.0 if faulty else 0.5)
    x = 4 * torch.randn(64, 32)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    return monitor


def batch_left_out(faulty: bool) -> gradwatch.Monitor:
    """A batch with NaN at step 50 that is left out because its loss is NaN, against one that never meets the model."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(100):
            inputs = x * (math.nan if step == 50 else 1)
            if not faulty and not inputs.isfinite().all():
                continue
            loss = nn.functional.mse_loss(model(inputs), y)
            if loss.isfinite():
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return monitor


def deep_sigmoids(faulty: bool) -> gradwatch.Monitor:
    """Fourteen layers of sigmoids, against ReLU."""
    model = mlp(depth=14, activation=nn.Sigmoid if faulty else nn.ReLU)
    for module in model:
        if isinstance(module, nn.Linear) and not faulty:
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    return watched(model, torch.optim.SGD(model.parameters(), lr=1e-3), 80)


def dying_units(faulty: bool) -> gradwatch.Monitor:
    """Biases that put every hidden unit below zero, against biases at zero."""
    model = mlp()
    hidden = model[0]
    assert isinstance(hidden, nn.Linear)
    nn.init.constant_(hidden.bias, -100.0 if faulty else 0.0)
    return watched(model, torch.optim.SGD(model.parameters(), lr=0.01), 80)


def stale_optimizer(faulty: bool) -> gradwatch.Monitor:
    """An optimizer that was built before half of the model, against one that was built after it."""
    model = mlp()
    owned = list(model.parameters())
    return watched(model, torch.optim.SGD(owned[:2] if faulty else owned, lr=0.05), 80)


def growing_weights(faulty: bool) -> gradwatch.Monitor:
    """Weights that grow by five per cent a step, as with a weight decay of the wrong sign, against weights left alone."""
    model = mlp()

    def grow(_: int) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1.05 if faulty else 1.0)

    return watched(model, torch.optim.SGD(model.parameters(), lr=1e-3), 60, each=grow)


def one_large_layer(faulty: bool) -> gradwatch.Monitor:
    """A first layer two hundred times too large before tanh, against one that is not; the rate is low in both."""
    model = mlp(activation=nn.Tanh)
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.weight.data.mul_(200 if faulty else 1)
    return watched(model, torch.optim.SGD(model.parameters(), lr=1e-6), 200)


def four_classes() -> tuple[Tensor, Tensor]:
    """Return inputs (1024, 8) and the classes (1024,) that they tell."""
    x, _ = data(1024)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def labels_by_lot(faulty: bool) -> gradwatch.Monitor:
    """Four classes drawn by lot, against four that the inputs tell."""
    x, told = four_classes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    labels = told[torch.randperm(len(told))] if faulty else told
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return watched(model, optimizer, 320, loss_of=nn.functional.cross_entropy, x_y=(x, labels))


def decay_too_high(faulty: bool) -> gradwatch.Monitor:
    """A decoupled weight decay that takes a tenth of the weights at each step, against the usual one."""
    x, labels = four_classes()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=10.0 if faulty else 0.01)
    return watched(model, optimizer, 160, loss_of=nn.functional.cross_entropy, x_y=(x, labels))


def adversarial(faulty: bool, log: Path | None = None) -> gradwatch.Monitor:
    """A generator whose loss saturates once its discriminator wins, against one whose loss does not."""
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model = nn.ModuleDict({"G": generator, "D": discriminator})
    slow, fast = (
        torch.optim.Adam(generator.parameters(), lr=2e-4),
        torch.optim.Adam(discriminator.parameters(), lr=1e-2),
    )
    with gradwatch.attach(model, log=log, report=None, strict=True) as monitor:
        for _ in range(400):
            real, fake = torch.randn(64, 2) / 10 + 3, generator(torch.randn(64, 8))
            fast.zero_grad()
            softplus = nn.functional.softplus
            (softplus(-discriminator(real)) + softplus(discriminator(fake.detach()))).mean().backward()
            fast.step()
            slow.zero_grad()
            judged = discriminator(generator(torch.randn(64, 8)))
            (-softplus(judged) if faulty else softplus(-judged)).mean().backward()
            slow.step()
    return monitor


def own_clip(bound: float, steps: int) -> gradwatch.Monitor:
    """The user's own clip at a bound."""
    model = mlp()

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), bound)

    return watched(model, torch.optim.SGD(model.parameters(), lr=0.01), steps, each=clip)


def clip_too_low(faulty: bool) -> gradwatch.Monitor:
    """A clip at a thousandth of the usual norm, against one at ten times of it."""
    return own_clip(1e-3 if faulty else 10.0, 200)


def clip_too_high(faulty: bool) -> gradwatch.Monitor:
    """A clip that nothing reaches for 600 steps, against one that bit on the first of them."""
    return own_clip(1e6 if faulty else 0.3, 600)


TRAININGS: dict[str, Training] = {
    "GW101": rate_of_nothing,
    "GW102": rate_too_high,
    "GW103": logarithm_of_zero,
    "GW104": wrong_sign,
    "GW105": smaller_targets,
    "GW106": forgotten,
    "GW201": adam_rate,
    "GW202": rate_too_high,
    "GW203": unscaled_targets,
    "GW301": one_bad_batch,
    "GW302": root_of_zero,
    "GW303": unscaled_targets,
    "GW304": growing_weights,
    "GW305": unscaled_targets,
    "GW306": large_gates,
    "GW307": batch_left_out,
    "GW401": deep_sigmoids,
    "GW402": dying_units,
    "GW403": stale_optimizer,
    "GW404": one_large_layer,
    "GW405": labels_by_lot,
    "GW406": decay_too_high,
    "GW407": adversarial,
    "GW501": clip_too_low,
    "GW502": clip_too_high,
}


def fired(monitor: gradwatch.Monitor) -> set[str]:
    """Return the codes of the rules that fired."""
    return {alarm.code for alarm in monitor.alarms if alarm.state == "firing"}


@pytest.mark.parametrize("code", [rule.code for rule in RULES])
def test_a_rule_fires_on_its_training_and_is_quiet_on_the_repaired_twin(code: str) -> None:
    """The pair differs in the fault alone."""
    assert code in fired(TRAININGS[code](True))
    twin = TRAININGS[code](False)
    assert code not in fired(twin)
    assert [incident for incident in twin.incidents if incident.severity != "notice"] == []
    assert math.isfinite(twin.history.loss(last=1)[0])
