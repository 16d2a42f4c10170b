"""Faults of the first weights: too large, all zero, too small, or one layer out of scale."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.faults.data import bars, digits, friedman, teacher
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import conv, mlp, weights
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def normal(run: Run, *, std: float | None) -> None:
    """A ReLU network of six layers on a random network's output; weights of a fixed deviation, or Kaiming's."""
    model = mlp(8, 32, 32, 32, 32, 32, 1)
    for weight in weights(model):
        if std is None:
            nn.init.kaiming_normal_(weight)
        else:
            nn.init.normal_(weight, std=std)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.5), batch_loss(model, teacher()))


def zeros(run: Run, *, zero: bool) -> None:
    """Adam on a ReLU network for digits, all of whose parameters start at zero or as torch makes them."""
    model = mlp(64, 32, 32, 10)
    if zero:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    fit(
        run,
        model,
        torch.optim.Adam(model.parameters(), 0.003),
        batch_loss(model, digits(), nn.functional.cross_entropy),
    )


def small(run: Run, *, gain: float) -> None:
    """A tanh network of eight layers on Friedman's formula, full batches; Xavier's weights times a factor."""
    model = mlp(10, 24, 24, 24, 24, 24, 24, 24, 1, act=nn.Tanh)
    for weight in weights(model):
        nn.init.xavier_normal_(weight, gain)
    fit(
        run, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), batch_loss(model, friedman(256), size=None)
    )


def scaled(run: Run, *, factor: float) -> None:
    """A conv net on images of bars with Nesterov momentum; the second convolution's weights times a factor."""
    model = conv(3)
    layer = model[3]
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight.mul_(factor)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
    fit(run, model, optimizer, batch_loss(model, bars(), nn.functional.cross_entropy))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "deep ReLU network with weights of deviation 1",
        "initialisation",
        partial(normal, std=1.0),
        partial(normal, std=None),
        "Weights of deviation 1 multiply the signal about fourfold in each layer of 32 units; Kaiming's repair it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "all parameters start at zero",
        "initialisation",
        partial(zeros, zero=True),
        partial(zeros, zero=False),
        "With all parameters zero no gradient reaches any weight and only the last bias moves; torch's random ones repair it.",
        symptoms=("dead", "frozen", "stalled"),
    ),
    Program(
        "deep tanh network with too small weights",
        "initialisation",
        partial(small, gain=0.1),
        partial(small, gain=1.0),
        "Weights a tenth of Xavier's let signal and gradient fade over eight layers; Xavier's own repair it.",
        symptoms=("vanishing", "stalled"),
    ),
    Program(
        "one convolution 100 times too large",
        "initialisation",
        partial(scaled, factor=100.0),
        partial(scaled, factor=1.0),
        "The second convolution starts at 100 times its weights; without the factor it learns.",
        symptoms=("exploding", "diverging", "dead", "stalled"),
        suspect="3.weight",
    ),
)
