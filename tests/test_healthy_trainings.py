"""Ordinary trainings that tempt a monitor: no incident of severity warning or worse."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch

Program = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]]


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 64) and labels."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def classify(model: nn.Module, steps: int, batch: int = 50, shape: tuple[int, ...] = (64,)) -> Iterator[Tensor]:
    """Yield losses of a classifier on digits."""
    x, y = digits()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        yield nn.functional.cross_entropy(model(x[chosen].view(-1, *shape)), y[chosen])


def a_line() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The first tutorial: y = 2 x + 1 for x up to 10."""
    model = nn.Linear(1, 1)
    x = torch.linspace(0, 10, 50)[:, None]
    return (
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        (nn.functional.mse_loss(model(x), 2 * x + 1) for _ in range(300)),
    )


def softmax_from_zero() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A zero-initialised linear classifier with a rate of 1."""
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=1.0), classify(model, 200)


def adagrad_from_zero() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The same under Adagrad."""
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    return model, torch.optim.Adagrad(model.parameters(), lr=0.1), classify(model, 200)


def batch_normalisation() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A convolution with a bias before a normalisation: its gradient is zero by mathematics."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), classify(model, 200, shape=(1, 8, 8))


def batch_normalisation_frozen_later() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """Then the bias before it has a gradient, a million times the rounding noise that it had."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

    def losses() -> Iterator[Tensor]:
        yield from classify(model, 200, shape=(1, 8, 8))
        model[1].eval().requires_grad_(requires_grad=False)
        yield from classify(model, 200, shape=(1, 8, 8))

    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), losses()


def batches_of_one() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """Losses and norms that scatter over orders of magnitude."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.05), classify(model, 1500, batch=1)


def batches_of_one_under_adam() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The same under Adam."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), classify(model, 1500, batch=1)


class Attention(nn.Module):
    """One head with learned positions for more places than the data have; a key's bias has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(64, 16))
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.output = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 10) of sequences (n, 8, 8)."""
        h = self.inputs(x) + self.positions[: x.shape[1]]
        h = h + nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        logits: Tensor = self.output(h.mean(1))
        return logits


def attention() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A small transformer block."""
    model = Attention()
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3), classify(model, 300, shape=(8, 8))


def hinge_at_its_floor() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A loss that reaches zero and stays there."""
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.cat([torch.randn(40, 2) + 4, torch.randn(40, 2) - 4])
    y = torch.cat([torch.ones(40, 1), -torch.ones(40, 1)])
    return model, torch.optim.SGD(model.parameters(), lr=0.1), (torch.relu(1 - y * model(x)).mean() for _ in range(300))


def one_cycle() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A rate that rises and falls, with momentum."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=302)

    def losses() -> Iterator[Tensor]:
        for step, loss in enumerate(classify(model, 300)):
            if step:
                schedule.step()
            yield loss

    return model, optimizer, losses()


def unfreezing_by_rate() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A backbone at rate zero beside a head that trains."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.1}]
    return model, torch.optim.SGD(groups), classify(model, 200)


def full_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    squared: bool = True,
    shape: tuple[int, ...] = (64,),
) -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """Gradient descent on the same two hundred digits at each step."""
    x, y = digits()
    x, y = (x - x.mean(0))[:200].view(-1, *shape), y[:200]
    target = nn.functional.one_hot(y).float()

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            if squared:
                yield nn.functional.mse_loss(model(x), target, reduction="none").sum(1).mean() / 2
            else:
                yield nn.functional.cross_entropy(model(x), y)

    return model, optimizer, losses()


def tanh_net() -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def conv_net() -> nn.Sequential:
    """Two convolutions and a linear layer."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(
        *first, nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )


def edge_of_stability() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The curvature grows until it is 2 over the rate; then loss and gradients swing up, and come back by themselves."""
    model = tanh_net()
    return full_batch(model, torch.optim.SGD(model.parameters(), lr=0.6), 300)


def edge_of_stability_by_convolutions() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The same, where the gradients of single layers grow a hundredfold meanwhile."""
    model = conv_net()
    return full_batch(model, torch.optim.SGD(model.parameters(), lr=0.35), 250, shape=(1, 8, 8))


def edge_of_stability_with_momentum() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The edge lies at 3.8 over the rate."""
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.33, momentum=0.9)
    return full_batch(model, optimizer, 200, shape=(1, 8, 8))


def edge_of_stability_of_a_cross_entropy() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """Its curvature falls again once the classes are told apart."""
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.45)
    return full_batch(model, optimizer, 300, squared=False, shape=(1, 8, 8))


def edge_of_stability_of_a_regression() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """The curvature goes past the edge before the loss swings up, tenfold within a few steps."""
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x, way = torch.randn(256, 10), torch.randn(10, 1)
    y = torch.sin(x @ way)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), (nn.functional.mse_loss(model(x), y) for _ in range(400))


def values_of_a_chain() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """Deep Q-learning of a chain of six states: many units act for none of so few inputs, and targets jump every 200 steps."""
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    target = copy.deepcopy(model)

    def losses() -> Iterator[Tensor]:
        for step in range(2500):
            if step % 200 == 0:
                target.load_state_dict(model.state_dict())
            state, forward = torch.randint(0, 5, (32,)), torch.randint(0, 2, (32,))
            after = (state + 1) * forward
            ends = after == 5
            with torch.no_grad():
                ahead = target(torch.eye(6)[after]).amax(1)
            value = model(torch.eye(6)[state])[torch.arange(32), forward]
            yield nn.functional.smooth_l1_loss(value, torch.where(ends, 1.0, 0.95 * ahead))

    return model, torch.optim.Adam(model.parameters(), lr=1e-3), losses()


PROGRAMS: list[Program] = [
    a_line,
    softmax_from_zero,
    adagrad_from_zero,
    batch_normalisation,
    batch_normalisation_frozen_later,
    batches_of_one,
    batches_of_one_under_adam,
    attention,
    hinge_at_its_floor,
    one_cycle,
    unfreezing_by_rate,
    edge_of_stability,
    edge_of_stability_by_convolutions,
    edge_of_stability_with_momentum,
    edge_of_stability_of_a_cross_entropy,
    edge_of_stability_of_a_regression,
    values_of_a_chain,
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_healthy_training_raises_no_alarm_and_is_never_clipped(program: Program, seed: int) -> None:
    """Auto-clip is armed: it must not touch a gradient."""
    torch.manual_seed(seed)
    model, optimizer, losses = program()
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [incident for incident in monitor.incidents if incident.severity != "notice"] == []
    assert set(monitor.history.clip_coefficient()) == {1.0}


def watched(
    program: tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]],
) -> tuple[list[float], gradwatch.Monitor]:
    """Return the losses of a run, up to the first that is not finite, and its monitor."""
    model, optimizer, losses = program
    seen: list[float] = []
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
            if not math.isfinite(seen[-1]):
                break
    return seen, monitor


@pytest.mark.parametrize("seed", range(2))
def test_the_edge_is_reached_where_the_loss_goes_up_at_many_steps_and_down_over_many(seed: int) -> None:
    """Else these programs would tempt no rule; the gradients surge as they do in an explosion."""
    torch.manual_seed(seed)
    losses, monitor = watched(edge_of_stability_by_convolutions())
    rises = sum(after > before for before, after in pairwise(losses))
    assert rises > len(losses) / 10
    assert losses[-1] < losses[0] / 2
    assert any(alarm.code == "GW301" for alarm in monitor.alarms)
    assert monitor.verdict == "healthy"


def test_a_notice_on_a_swing_says_how_long_the_update_is_and_not_to_look_at_the_batch() -> None:
    """There is one batch, and the lengths of the updates explain the jump."""
    torch.manual_seed(0)
    _, monitor = watched(edge_of_stability_of_a_regression())
    for incident in monitor.incidents:
        assert incident.kind == "spike"
        (line,) = incident.advice
        assert re.match(
            r"By its gradients, the update of step \d+ would lower the loss by [\d.]+ times itself: at more", line
        )
        assert line.endswith("lower the learning rate (0.2 when this began).")
    assert monitor.incidents


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_rate_beyond_the_edge_is_found_before_the_loss_is_tenfold(momentum: float, seed: int) -> None:
    """The same net at a rate from which it does not come back."""
    torch.manual_seed(seed)
    model = tanh_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.1 if momentum else 2.0, momentum=momentum)
    losses, monitor = watched(full_batch(model, optimizer, 200))
    grave = [incident for incident in monitor.incidents if incident.severity != "notice"]
    beyond = next(step for step, loss in enumerate(losses) if not loss < 10 * losses[0])
    assert grave[0].kind == "exploding"
    assert grave[0].opened_step <= beyond
    assert monitor.verdict == "confirmed"


@pytest.mark.parametrize("rate", [2e-3, 4e-3])
def test_branches_that_begin_at_a_millionth_may_grow(rate: float) -> None:
    """As in ConvNeXt: their gradients grow ten-thousandfold, and are still next to nothing beside the others."""
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.scale = nn.Parameter(1e-6 * torch.ones(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x + self.scale * self.inner(x)
            return result

    model = nn.Sequential(nn.Linear(8, 16), *(Block() for _ in range(4)), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x[:, :4] * x[:, 4:]).argmax(1))
            loss.backward()
            optimizer.step()
    assert loss.item() < 1
    assert [one for one in monitor.incidents if one.severity != "notice"] == []
