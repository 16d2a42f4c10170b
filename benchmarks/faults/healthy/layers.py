"""Healthy trainings with layers that change what gradients look like: norms, dropout, residual branches, deep tanh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from benchmarks.faults.data import centred_images, curve, digits
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp, normed_conv
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _dropout(run: Run) -> None:
    x, y = digits()
    model = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _weight_norm(run: Run) -> None:
    x, y = curve(1000)
    layers = [parametrizations.weight_norm(nn.Linear(*sizes)) for sizes in ((8, 48), (48, 48), (48, 1))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _square(model(x), y)))


def _spectral_norm(run: Run) -> None:
    x, y = digits()
    layers = [parametrizations.spectral_norm(nn.Linear(*sizes)) for sizes in ((64, 64), (64, 64))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _batch_norm(run: Run) -> None:
    x, y = centred_images()
    model = normed_conv(16, nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


def _group_norm(run: Run) -> None:
    x, y = centred_images()
    model = normed_conv(16, lambda width: nn.GroupNorm(4, width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(8, x, y), lambda x, y: _entropy(model(x), y)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.two.weight)
        nn.init.zeros_(self.two.bias)

    def forward(self, x: Tensor) -> Any:
        return x + self.two(torch.relu(self.one(self.norm(x))))


def _zero_residual(run: Run) -> None:
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), *(_Residual(32) for _ in range(5)), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _deep_tanh(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 48, 48, 48, 48, 48, 10, act=nn.Tanh)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


PROGRAMS: tuple[Program, ...] = (
    healthy("digits with heavy dropout", _dropout, "Half of each layer is off, so that the loss stays noisy."),
    healthy("weight norm", _weight_norm, "Direction and length are tensors of their own, with unlike gradients."),
    healthy("spectral norm", _spectral_norm, "The raw weights drift freely, for only their direction counts."),
    healthy(
        "conv net with batch norm", _batch_norm, "Scale-free weights have gradients that change with their length."
    ),
    healthy(
        "conv net with group norm, batch of 8", _group_norm, "Small batches and a rate that is high for AdamW.", 400
    ),
    healthy(
        "residual branches from zero",
        _zero_residual,
        "Half of each branch has no gradient at first, for its end is zero.",
    ),
    healthy("deep tanh net", _deep_tanh, "Six tanh layers, which may saturate and lose their gradients."),
)
