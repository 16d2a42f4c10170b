"""Faults of hand-written formulas: logarithm, root, quotient and exponential at the edge of what numbers can hold."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.data import clusters, digit_images, friedman, teacher
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import conv, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def _own_binary(logits: Tensor, wanted: Tensor) -> Tensor:
    chance = torch.sigmoid(logits)
    return -(wanted * torch.log(chance) + (1 - wanted) * torch.log(1 - chance)).mean()


def logarithm(run: Run, *, own: bool) -> None:
    """Nesterov momentum on two clouds of points in large units, with a hand-written cross-entropy or torch's on logits."""
    x, y = clusters(classes=2, apart=2.0)
    model = mlp(8, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, nesterov=True)
    loss = _own_binary if own else nn.functional.binary_cross_entropy_with_logits
    fit(run, model, optimizer, batch_loss(model, (10 * x, y[:, None].float()), loss))


def distance(run: Run, *, epsilon: float) -> None:
    """RMSprop on a conv net whose distance of two digits shall be 0 or 1; now and then both are one image."""
    images, labels = digit_images()
    pairs = torch.randint(len(images), (2000, 2))
    pairs[:4, 1] = pairs[:4, 0]
    model = conv(8)

    def loss(codes: Tensor, differ: Tensor) -> Tensor:
        first, second = codes.view(2, -1, 8)
        apart = ((first - second).square().sum(1) + epsilon).sqrt()
        return nn.functional.mse_loss(apart, differ)

    optimizer = torch.optim.RMSprop(model.parameters(), 0.001)
    run.watch(model)
    while True:
        first, second = pairs[torch.randint(len(pairs), (16,))].unbind(1)
        optimizer.zero_grad()
        error = loss(model(images[torch.cat([first, second])]), (labels[first] != labels[second]).float())
        error.backward()
        optimizer.step()
        run.step(error)


class Standard(nn.Module):
    """Each feature of a batch minus its mean, over its deviation plus an epsilon."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """As x."""
        return (x - x.mean(0)) / (x.std(0) + self.epsilon)


def deviation(run: Run, *, epsilon: float) -> None:
    """Momentum on Friedman's formula with a rare feature, which some batches lack, standardised batch by batch."""
    x, y = friedman()
    rare = (torch.rand(len(x), 1) < 0.12).float()
    model = nn.Sequential(Standard(epsilon), mlp(11, 32, 32, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    fit(run, model, optimizer, batch_loss(model, (torch.cat([x, rare], 1), y + rare)))


class Pick(nn.Module):
    """Attention with a hand-written softmax over the items of a set, which shifts its scores or not."""

    def __init__(self, *, shift: bool) -> None:
        super().__init__()
        self.shift = shift
        self.score = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1, bias=False))
        self.value, self.head = nn.Linear(2, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two values; x is (rows, items, 3)."""
        scores = self.score(x)
        powers = torch.exp(scores - scores.max(1, keepdim=True)[0] if self.shift else scores)
        mixed = (powers / powers.sum(1, keepdim=True) * self.value(x[..., 1:])).sum(1)
        return self.head(mixed)  # type: ignore[no-any-return]


def exponential(run: Run, *, shift: bool) -> None:
    """Adam on attention that has to find the item of the largest key, and tell its two values."""
    keys, values = 10 * torch.randn(512, 6, 1), torch.randn(512, 6, 2)
    y = values[torch.arange(512), keys[..., 0].argmax(1)]
    model = Pick(shift=shift)
    fit(run, model, torch.optim.Adam(model.parameters(), 0.01), batch_loss(model, (torch.cat([keys, values], 2), y)))


class Adapted(nn.Module):
    """A network with an adapter beside it that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = mlp(8, 32, 32, 3, act=nn.Tanh)
        self.adapter = nn.Linear(8, 3, bias=False)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.base(x) + self.adapter(x)  # type: ignore[no-any-return]


def lasso(run: Run, *, epsilon: float) -> None:
    """Adagrad on three targets with a group lasso on the columns of an adapter that starts at zero."""
    model = Adapted()

    def loss(guess: Tensor, wanted: Tensor) -> Tensor:
        groups = model.adapter.weight.square().sum(0)
        return nn.functional.mse_loss(guess, wanted) + 0.01 * torch.sqrt(groups + epsilon).sum()

    fit(run, model, torch.optim.Adagrad(model.parameters(), 0.05), batch_loss(model, teacher(outputs=3), loss))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "logarithm of zero in a cross-entropy",
        "numerics",
        partial(logarithm, own=True),
        partial(logarithm, own=False),
        "A sigmoid beyond 17 is exactly 1, and 0 times log(0) is no number; torch's loss on logits repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "square root at zero in a distance",
        "numerics",
        partial(distance, epsilon=0.0),
        partial(distance, epsilon=1e-6),
        "The distance of an image to itself is 0, where the root's slope is infinite; an epsilon under the root repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "division by a deviation of zero",
        "numerics",
        partial(deviation, epsilon=0.0),
        partial(deviation, epsilon=1e-5),
        "A feature that is the same in a whole batch has deviation 0, and 0 / 0 is no number; an epsilon repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "softmax overflows",
        "numerics",
        partial(exponential, shift=False),
        partial(exponential, shift=True),
        "The exponential of a score above 88 is infinite, its share no number; subtracting the largest repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "norm of a zero weight in a penalty",
        "numerics",
        partial(lasso, epsilon=0.0),
        partial(lasso, epsilon=1e-6),
        "The group lasso's root has no slope at the adapter's zeros, so its gradient is no number; an epsilon repairs it.",
        symptoms=("nonfinite",),
        suspect="adapter.weight",
    ),
)
