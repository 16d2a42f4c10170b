"""Healthy trainings on tables and tables of bits: on large scales, ill-conditioned, flat for long, solved exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.data import curve, digits
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _logistic(run: Run) -> None:
    x, y = digits()
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.5), lambda: _entropy(model(x), y))


def _ill_conditioned(run: Run) -> None:
    scale = torch.logspace(-1, 1, 10)
    x = torch.randn(500, 10) * scale
    y = x @ (torch.randn(10, 1) / scale.unsqueeze(1)) + 0.05 * torch.randn(500, 1)
    model = nn.Linear(10, 1)
    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.008), lambda: _square(model(x), y))


def _large_targets(run: Run) -> None:
    x, y = curve(1000)
    model = mlp(8, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    fit(run, model, optimizer, over(batches(64, x, 100 + 30 * y), lambda x, y: _square(model(x), y)))


def _summed(run: Run) -> None:
    x, y = curve(2000, noise=0.3)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    fit(run, model, optimizer, over(batches(512, x, y), lambda x, y: _square(model(x), y, reduction="sum")))


def _parity(run: Run) -> None:
    model = mlp(6, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def loss() -> Tensor:
        x = torch.randint(2, (128, 6)) * 2.0 - 1
        return functional.binary_cross_entropy_with_logits(model(x), (x[:, :3].prod(1, keepdim=True) + 1) / 2)

    fit(run, model, optimizer, loss)


def _xor_table(run: Run) -> None:
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    y = (x.prod(1, keepdim=True) + 1) / 2
    model = mlp(4, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(run, model, optimizer, lambda: functional.binary_cross_entropy_with_logits(model(x), y))


def _exact_fit(run: Run) -> None:
    x = torch.randn(200, 10)
    y = x @ torch.randn(10, 2)
    model = nn.Linear(10, 2)
    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        over(batches(64, x, y), lambda x, y: _square(model(x), y)),
    )


def _autoencoder(run: Run) -> None:
    x = torch.randn(500, 3) @ torch.randn(3, 12) / 2
    model = mlp(12, 32, 6, 32, 12, act=nn.GELU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    fit(run, model, optimizer, over(batches(128, x), lambda x: _square(model(x), x)), schedule=schedule)


PROGRAMS: tuple[Program, ...] = (
    healthy(
        "logistic regression from zeros", _logistic, "All weights start at zero, so each step is huge beside them."
    ),
    healthy(
        "linear regression, ill-conditioned", _ill_conditioned, "The slow directions make it look stalled at once."
    ),
    healthy("targets near 100", _large_targets, "The loss starts at 1e4 and the last bias grows a hundredfold."),
    healthy(
        "summed squared error", _summed, "Sums over 512 rows make gradient norms of hundreds and thousands, and stable."
    ),
    healthy(
        "parity of three bits", _parity, "A plateau at chance, tiny gradients, then a sudden drop with large ones."
    ),
    healthy(
        "truth table of four bits",
        _xor_table,
        "A long plateau, then a sudden drop towards a loss of almost nothing.",
        400,
    ),
    healthy("exact linear fit", _exact_fit, "Loss and gradients fall to rounding error because it is solved."),
    healthy("autoencoder of rank three", _autoencoder, "The loss falls by orders of magnitude, the gradients with it."),
)
