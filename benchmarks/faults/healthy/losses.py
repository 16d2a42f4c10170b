"""Healthy trainings with losses that stall, turn negative, have kinks, or come from heavy tails."""

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


def _gaussian(run: Run) -> None:
    x = torch.rand(1000, 1) * 4 - 2
    y = torch.sin(2 * x) + (0.02 + 0.04 * x.abs()) * torch.randn(1000, 1)
    model = mlp(1, 32, 32, 2, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = model(x).chunk(2, 1)
        return functional.gaussian_nll_loss(mean, y, log_variance.exp(), eps=1e-4)

    fit(run, model, optimizer, over(batches(128, x, y), loss))


def _smoothed(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 10, act=nn.GELU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y, label_smoothing=0.2)))


def _hinge(run: Run) -> None:
    x = torch.randn(600, 20)
    score = x @ torch.randn(20)
    far = score.abs() > 1.0  # a gap between the classes, so that the hinge can reach zero
    x, y = x[far], score[far].sign()
    model = nn.Linear(20, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(run, model, optimizer, over(batches(16, x, y), lambda x, y: torch.relu(1 - y * model(x).squeeze(1)).mean()))


def _heavy_tailed(run: Run) -> None:
    x, y = curve(2000, noise=0.0)
    y = 2 * y + 0.3 * torch.distributions.StudentT(2.0).sample(y.shape)
    model = mlp(8, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: functional.huber_loss(model(x), y)))


def _heavy_tailed_square(run: Run) -> None:
    x, y = curve(2000, noise=0.0)
    y = 3 * y + 0.3 * torch.distributions.StudentT(2.5).sample(y.shape)
    model = mlp(8, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _square(model(x), y)))


def _quantile(run: Run) -> None:
    x, y = curve(1500, noise=0.3)
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = mlp(8, 48, 48, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        error = y - model(x)
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _poisson(run: Run) -> None:
    x, y = curve(1500, noise=0.0)
    counts = torch.poisson((2.5 + 0.8 * y).exp())
    model = mlp(8, 32, 32, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(64, x, counts), lambda x, y: functional.poisson_nll_loss(model(x), y)))


def _focal(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        each = _entropy(model(x), y, reduction="none")
        return ((1 - (-each).exp()) ** 3 * each).mean()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


PROGRAMS: tuple[Program, ...] = (
    healthy(
        "Gaussian likelihood", _gaussian, "The loss turns negative and its gradients grow as the variance shrinks."
    ),
    healthy("label smoothing", _smoothed, "The loss stalls near 0.9, its least possible value."),
    healthy(
        "hinge loss", _hinge, "Once all margins are met the loss and the gradients are exactly zero in many steps."
    ),
    healthy("heavy-tailed noise, Huber", _heavy_tailed, "Outliers keep the loss jumping."),
    healthy(
        "heavy-tailed noise, squared",
        _heavy_tailed_square,
        "Now and then one row makes a loss tens of times the usual.",
    ),
    healthy("quantiles", _quantile, "Gradients do not shrink near the optimum, for the loss has kinks."),
    healthy("counts", _poisson, "The Poisson likelihood is far below zero and its first gradients are large."),
    healthy("focal loss", _focal, "Rows that are learned count for almost nothing, so gradients vanish."),
)
