"""Faults of the learning rate: too high at once, later, by creep or in cycles, and far too low."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.data import bars, digit_images, digits, friedman, teacher, waves, words
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import Bag, Reader, conv, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def at_once(run: Run, *, lr: float) -> None:
    """Plain SGD on Friedman's formula."""
    model = mlp(10, 32, 32, 1)
    fit(run, model, torch.optim.SGD(model.parameters(), lr), batch_loss(model, friedman()))


def wrong_way(run: Run, *, factor: float) -> None:
    """A step schedule for a conv net on digits: the rate changes by a factor at step 150."""
    model = conv()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    fit(
        run,
        model,
        optimizer,
        batch_loss(model, digit_images(), nn.functional.cross_entropy),
        rate=lambda step: 0.02 * (factor if step >= 150 else 1),
    )


def creep(run: Run, *, gamma: float) -> None:
    """An autoencoder of digits with Nesterov momentum, whose rate changes by a factor each step from step 100."""
    model = mlp(64, 48, 12, 48, 64, act=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    x = digits()[0]
    fit(run, model, optimizer, batch_loss(model, (x, x)), rate=lambda step: 0.1 * gamma ** max(0, step - 100))


class Tagger(nn.Module):
    """A transformer layer that tells for a sentence which of eight words its first one is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.place = nn.Parameter(0.1 * torch.randn(8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Eight logits; x is (rows, 8)."""
        return self.head(self.layer(self.table(x) + self.place).mean(1))  # type: ignore[no-any-return]


def adam(run: Run, *, lr: float) -> None:
    """Adam on a one-layer transformer that has to find a sentence's first word."""
    model = Tagger()
    x = torch.randint(8, (512, 8))
    fit(
        run,
        model,
        torch.optim.Adam(model.parameters(), lr),
        batch_loss(model, (x, x[:, 0]), nn.functional.cross_entropy),
    )


def cycles(run: Run, *, peak: float) -> None:
    """Triangular cycles of 50 steps between 0.005 and a peak, SGD, a conv net on images of bars."""
    model = conv(3)
    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), 0.005, momentum=0.9),
        batch_loss(model, bars(), nn.functional.cross_entropy),
        rate=lambda step: 0.005 + (peak - 0.005) * (1 - abs(step % 50 / 25 - 1)),
    )


def warm_up(run: Run, *, longest: int) -> None:
    """AdamW on a bag of embeddings, with a warm-up of 0.002 a step that ends after so many steps."""
    model = Bag()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    fit(run, model, optimizer, batch_loss(model, words()), rate=lambda step: 2e-3 * min(step + 1, longest))


def rmsprop(run: Run, *, lr: float) -> None:
    """RMSprop on six targets of a random network at once."""
    model = mlp(8, 48, 48, 6, act=nn.Tanh)
    fit(run, model, torch.optim.RMSprop(model.parameters(), lr), batch_loss(model, teacher(outputs=6)))


def tiny(run: Run, *, lr: float) -> None:
    """Adagrad on a GRU that continues sines."""
    model = Reader(nn.GRU(1, 12, batch_first=True))
    fit(run, model, torch.optim.Adagrad(model.parameters(), lr), batch_loss(model, waves(length=12)))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "SGD rate too high from the start",
        "learning rate",
        partial(at_once, lr=2.0),
        partial(at_once, lr=0.05),
        "Plain SGD at rate 2 overshoots from the first step; rate 0.05 learns.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "step schedule multiplies the rate",
        "learning rate",
        partial(wrong_way, factor=60),
        partial(wrong_way, factor=0.1),
        "The schedule multiplies the rate by 60 at step 150 where it should divide it by 10.",
        onset=150,
        symptoms=("exploding", "spike", "diverging", "dead", "stalled"),
    ),
    Program(
        "rate creeps up 5 % a step",
        "learning rate",
        partial(creep, gamma=1.05),
        partial(creep, gamma=0.995),
        "An exponential schedule has a factor above 1, so the rate grows 5 % a step from step 100; a factor of 0.995 repairs it.",
        onset=50,
        symptoms=("exploding", "diverging"),
    ),
    Program(
        "Adam rate of 1 for a transformer",
        "learning rate",
        partial(adam, lr=1.0),
        partial(adam, lr=0.005),
        "Adam moves each weight by about its rate, so a rate of 1 wrecks all weights at once; 0.005 learns.",
        symptoms=("exploding", "diverging", "stalled"),
    ),
    Program(
        "cyclic rate with far too high a peak",
        "learning rate",
        partial(cycles, peak=5.0),
        partial(cycles, peak=0.02),
        "The peak of each cycle is 5 where 0.02 was meant.",
        symptoms=("exploding", "spike", "dead", "stalled"),
    ),
    Program(
        "warm-up that never ends",
        "learning rate",
        partial(warm_up, longest=400),
        partial(warm_up, longest=5),
        "The warm-up lacks its upper limit, so the rate grows for ever; an end after 5 steps repairs it.",
        onset=5,
        symptoms=("spike", "diverging"),
    ),
    Program(
        "RMSprop rate too high",
        "learning rate",
        partial(rmsprop, lr=0.5),
        partial(rmsprop, lr=0.003),
        "RMSprop at rate 0.5 throws the weights about; 0.003 learns.",
        symptoms=("exploding", "diverging", "stalled"),
    ),
    Program(
        "rate far too low",
        "learning rate",
        partial(tiny, lr=1e-9),
        partial(tiny, lr=0.1),
        "A rate of 1e-9 changes no weight noticeably, so nothing is learned; 0.1 learns.",
        symptoms=("stalled", "frozen"),
    ),
)
