"""Healthy trainings whose data look wrong: noisy, unbalanced, mixed, made harder, or changing while they are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import curve, digits
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _curriculum(run: Run) -> None:
    x, y = digits()
    easy = y < 3
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    early, late = batches(64, x[easy], y[easy]), batches(64, x, y)

    def loss() -> Tensor:
        inputs, classes = next(early if run.made < 100 else late)
        return _entropy(model(inputs), classes)

    fit(run, model, optimizer, loss)


def _noisy_labels(run: Run) -> None:
    x, y = digits()
    y = torch.where(torch.rand(len(y)) < 0.2, torch.randint(10, y.shape), y)
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _imbalanced(run: Run) -> None:
    x = torch.randn(4000, 10)
    y = (torch.rand(4000) < 0.02).float()
    x[:, :2] += 3 * y.unsqueeze(1)
    model = mlp(10, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    loss = functional.binary_cross_entropy_with_logits
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: loss(model(x).squeeze(1), y)))


def _adversarial(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_entropy(model(x), y), x)
        return _entropy(model(x.detach() + 0.1 * slope.sign()), y)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _mixup(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        share, other = torch.rand(()), torch.randperm(len(x))
        logits = model(share * x + (1 - share) * x[other])
        return share * _entropy(logits, y) + (1 - share) * _entropy(logits, y[other])

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _shifted(run: Run) -> None:
    x, y = curve(2000, noise=0.05)
    model = mlp(8, 64, 64, 1, act=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    data = batches(64, x, y)

    def loss() -> Tensor:
        inputs, targets = next(data)
        season = run.made // 75  # the world changes four times, and is learned anew each time
        return _square(model(inputs.roll(season, 1)), targets + 0.5 * season)

    fit(run, model, optimizer, loss)


PROGRAMS: tuple[Program, ...] = (
    healthy("from three classes to ten", _curriculum, "At step 100 seven unseen classes arrive and the loss jumps."),
    healthy(
        "one label in five drawn by lot",
        _noisy_labels,
        "The loss stalls above 1, with large gradients: the noise is not learnable.",
    ),
    healthy(
        "one positive in fifty",
        _imbalanced,
        "Batches without a positive have almost no gradient, the others a large one.",
    ),
    healthy("adversarial training", _adversarial, "Each batch is made worse on purpose, and needs two backwards."),
    healthy("mixed rows", _mixup, "The loss swings with the share that is mixed in, and stays high."),
    healthy("a world that changes", _shifted, "Four times the loss jumps, because the data do, and is learned again."),
)
