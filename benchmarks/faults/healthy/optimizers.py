"""Healthy trainings whose steps are of an unusual kind: tiny and huge batches, sums of batches, clips, other optimizers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.data import centred_images, curve, digits, rings
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _lbfgs(run: Run) -> None:
    x, y = curve(300, noise=0.05)
    model = mlp(8, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _square(model(x), y)
        loss.backward()
        return loss

    run.watch(model)
    while True:
        run.step(optimizer.step(closure))


def _batch_of(size: int, rate: float) -> Any:
    def train(run: Run) -> None:
        x, y = centred_images()
        model = mlp(64, 48, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        fit(run, model, optimizer, over(batches(size, x.flatten(1), y), lambda x, y: _entropy(model(x), y)))

    return train


def _decayed(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _large_batch(run: Run) -> None:
    x, y = centred_images()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    objective = over(batches(1024, x.flatten(1), y), lambda x, y: _entropy(model(x), y))
    fit(run, model, optimizer, objective, schedule=schedule)


def _accumulated(run: Run) -> None:
    x, y = curve(1000)
    model = mlp(8, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = batches(8, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in itertools.islice(data, 8):
            loss = _square(model(inputs), targets) / 8
            loss.backward()
            total += loss.item()
        optimizer.step()
        run.step(total)


def _clipped(run: Run) -> None:
    x, y = curve(1000, noise=0.2)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    fit(run, model, optimizer, over(batches(16, x, 3 * y), lambda x, y: _square(model(x), y)), clip=0.5)


def _adagrad(run: Run) -> None:
    words = (torch.rand(1000, 200) < 1 / torch.arange(1, 201)).float()
    y = (words @ torch.randn(200, 1) > 0).float()
    model = mlp(200, 16, 1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    loss = functional.binary_cross_entropy_with_logits
    fit(run, model, optimizer, over(batches(32, words, y), lambda x, y: loss(model(x), y)))


def _nesterov(run: Run) -> None:
    x, y = rings(1000)
    model = mlp(2, 32, 32, 32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.95, nesterov=True)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _rmsprop(run: Run) -> None:
    x, y = centred_images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


PROGRAMS: tuple[Program, ...] = (
    healthy(
        "regression by LBFGS", _lbfgs, "Line searches make steps of very unequal size; then nothing is left to do.", 120
    ),
    healthy("digits, batch of two", _batch_of(2, 0.05), "Loss and gradients jump by tens from step to step.", 400),
    healthy(
        "digits, batch of one", _batch_of(1, 0.03), "Most steps have a gradient near zero, and some a large one.", 400
    ),
    healthy("weight decay", _decayed, "Weights shrink for most of the run and the loss settles above zero."),
    healthy("batch of 1024", _large_batch, "A high rate with warm-up, then gradients of almost nothing."),
    healthy("accumulated gradients", _accumulated, "Eight backwards go before each step."),
    healthy("clipped by the user", _clipped, "Every gradient before the clip is beyond its limit for a long time."),
    healthy(
        "rare features, Adagrad", _adagrad, "Most inputs are zero, and the effective rate starts high and dies away."
    ),
    healthy("rings with Nesterov", _nesterov, "Momentum of 0.95 overshoots and swings before it settles."),
    healthy("small conv net, RMSprop", _rmsprop, "The first steps of RMSprop are ten times as large as the rest."),
)
