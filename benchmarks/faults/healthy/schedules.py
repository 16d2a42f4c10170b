"""Healthy trainings whose rate rises and falls by a schedule, and those that are resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.data import centred_images, curve, digits
from benchmarks.faults.loops import batches, fit, over, train_before
from benchmarks.faults.models import mlp, normed_conv
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _cyclical(run: Run) -> None:
    x, y = centred_images()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = lr_scheduler.CyclicLR(optimizer, 0.005, 0.1, step_size_up=40, cycle_momentum=False)
    objective = over(batches(64, x.flatten(1), y), lambda x, y: _entropy(model(x), y))
    fit(run, model, optimizer, objective, schedule=schedule)


def _restarts(run: Run) -> None:
    x, y = curve(1500)
    model = mlp(8, 48, 48, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=50, T_mult=2)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _square(model(x), y)), schedule=schedule)


def _one_cycle(run: Run) -> None:
    x, y = centred_images()
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=run.steps + 1)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)), schedule=schedule)


def _step_decay(run: Run) -> None:
    x, y = centred_images()
    model = normed_conv(12, nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = lr_scheduler.MultiStepLR(optimizer, [150, 225], 0.1)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)), schedule=schedule)


def _resumed_noise(run: Run) -> None:
    x, y = curve(1000, noise=0.3)
    model = mlp(8, 32, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    objective = over(batches(64, x, y), lambda x, y: _square(model(x), y))
    train_before(optimizer, objective, 1500)
    fit(run, model, optimizer, objective)


def _resumed_exact(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    objective = over(batches(128, x, y), lambda x, y: _entropy(model(x), y))
    train_before(optimizer, objective, 1200)
    fit(run, model, optimizer, objective)


PROGRAMS: tuple[Program, ...] = (
    healthy("cyclical rate", _cyclical, "The rate rises 20-fold again and again, and the loss with it a little."),
    healthy("warm restarts", _restarts, "At each restart the rate jumps and loss and gradients rise for a while."),
    healthy(
        "one cycle", _one_cycle, "The rate climbs for a third of the run, then falls to nothing, and updates with it."
    ),
    healthy("rate cut tenfold, twice", _step_decay, "At each cut loss and updates drop at once."),
    healthy("resumed at the noise floor", _resumed_noise, "The loss does not fall at all: it had converged before."),
    healthy("resumed when solved", _resumed_exact, "Loss and gradients are almost nothing from the first step."),
)
