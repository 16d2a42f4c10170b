"""Ordinary trainings that tempt a monitor: no incident of severity warning or worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


PROGRAMS: list[Program] = [
    a_line,
    softmax_from_zero,
    adagrad_from_zero,
    batch_normalisation,
    batches_of_one,
    batches_of_one_under_adam,
    attention,
    hinge_at_its_floor,
    one_cycle,
    unfreezing_by_rate,
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
