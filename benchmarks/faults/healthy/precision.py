"""Healthy trainings in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.faults.data import digits
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy = functional.cross_entropy


def _bfloat(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 96, 96, 96, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _entropy(model(x).float(), y)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _scaled(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=25)
    data = batches(64, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        inputs, classes = next(data)
        with torch.autocast("cpu", torch.float16):
            loss = _entropy(model(inputs).float(), classes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # made or skipped: a scale that grows until it overflows is how a scaler works
        scaler.update()
        run.step(loss)


PROGRAMS: tuple[Program, ...] = (
    healthy("bfloat16 autocast", _bfloat, "Gradients are coarse, and many equal."),
    healthy(
        "float16 with a loss scaler", _scaled, "The scale grows until a step overflows and is skipped, as it should."
    ),
)
