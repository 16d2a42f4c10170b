"""Shared pieces of the first half of the fault set: data that can be learned, small models, the training loop."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Run

Data = tuple[Tensor, Tensor]


def standard(values: Tensor) -> Tensor:
    """The columns with mean 0 and deviation 1."""
    return (values - values.mean(0)) / values.std(0)


def friedman(rows: int = 512) -> Data:
    """Friedman's first formula: ten features in -1.7 .. 1.7, of which five matter, and one standard target."""
    x = torch.rand(rows, 10)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return (x - 0.5) * math.sqrt(12), standard(y[:, None])


def teacher(rows: int = 512, inputs: int = 8, outputs: int = 1, hidden: int = 8) -> Data:
    """Normal features and the standardised outputs of a random tanh network."""
    x = torch.randn(rows, inputs)
    y = torch.tanh(x @ torch.randn(inputs, hidden) / math.sqrt(inputs)) @ torch.randn(hidden, outputs)
    return x, standard(y)


def clusters(rows: int = 512, features: int = 8, classes: int = 5, apart: float = 2.0) -> Data:
    """Normal clouds around random centres, and the number of each row's cloud."""
    y = torch.randint(classes, (rows,))
    return (torch.randn(classes, features) * apart)[y] + torch.randn(rows, features), y


@cache
def _digits() -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)


def digits(scale: float = 1 / 16) -> Data:
    """Scikit-learn's 1797 images of 8 x 8 pixels of 0 .. 16, scaled, and their ten classes."""
    x, y = _digits()
    return x * scale, y


def bars(rows: int = 512) -> Data:
    """Noisy 8 x 8 images of one bar, and its direction: across, down or along a diagonal."""
    y, at, along = torch.randint(3, (rows,)), torch.randint(8, (rows,)), torch.arange(8)
    x = 0.3 * torch.randn(rows, 1, 8, 8)
    for image, kind, place in zip(x, y.tolist(), at.tolist(), strict=True):
        row = torch.full((8,), place) if kind == 0 else along
        column = (along, torch.full((8,), place), (along + place) % 8)[kind]
        image[0, row, column] += 1.0
    return x, y


def waves(rows: int = 256, length: int = 40) -> Data:
    """Sines of random pitch and phase with a little noise, and the value after the last."""
    pitch, phase = 0.2 + 0.4 * torch.rand(rows, 1), 6.28 * torch.rand(rows, 1)
    wave = torch.sin(pitch * torch.arange(length + 1) + phase)
    return (wave[:, :-1] + 0.02 * torch.randn(rows, length))[..., None], wave[:, -1:]


def words(rows: int = 512, length: int = 8, vocabulary: int = 20) -> Data:
    """Sentences of random words, and the standardised sum of their words' hidden values."""
    x = torch.randint(vocabulary, (rows, length))
    return x, standard(torch.randn(vocabulary)[x].sum(1, keepdim=True))


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes with activations between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


def conv(classes: int = 10, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions, a pooling and a linear layer for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        act(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


class Reader(nn.Module):
    """A recurrent layer and a linear one that reads its last state."""

    def __init__(self, cell: nn.RNNBase, outputs: int = 1) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The prediction after the last step; x is (rows, steps, features)."""
        return self.head(self.cell(x)[0][:, -1])  # type: ignore[no-any-return]


class Bag(nn.Module):
    """The mean of the words' embeddings, and a small network on it."""

    def __init__(self, vocabulary: int = 20, width: int = 16, outputs: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.head = mlp(width, 32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The prediction; x is (rows, words)."""
        return self.head(self.table(x).mean(1))  # type: ignore[no-any-return]


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no biases or scales."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    *,
    batch: int | None = 32,
    rate: Callable[[int], float] | None = None,
    clip: float | None = None,
) -> None:
    """Train until the run has its steps: random batches (all rows for None), a schedule, a clip of the norm."""
    x, y = data
    run.watch(model)
    while True:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate(run.made)
        rows = torch.arange(len(x)) if batch is None else torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        run.step(loss)
