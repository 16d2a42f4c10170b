"""Faults of recurrent networks: gradients that grow or fade along the sequence, rates that gates cannot bear."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.data import standard, waves
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import Reader
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def chaotic(run: Run, *, gain: float, clip: float | None) -> None:
    """A tanh RNN that continues sines of 60 steps; its recurrent weights are orthogonal, times a gain."""
    model = Reader(nn.RNN(1, 24, batch_first=True))
    assert isinstance(model.cell.weight_hh_l0, Tensor)
    nn.init.orthogonal_(model.cell.weight_hh_l0, gain)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.05), batch_loss(model, waves(length=60)), clip=clip)


def growing(run: Run, *, gain: float, clip: float | None) -> None:
    """A ReLU RNN that averages 30 numbers; its recurrent weights are the identity, times a gain."""
    model = Reader(nn.RNN(1, 16, nonlinearity="relu", batch_first=True))
    assert isinstance(model.cell.weight_hh_l0, Tensor)
    nn.init.eye_(model.cell.weight_hh_l0)
    for bias in (model.cell.bias_ih_l0, model.cell.bias_hh_l0):
        assert isinstance(bias, Tensor)
        nn.init.zeros_(bias)
    with torch.no_grad():
        model.cell.weight_hh_l0.mul_(gain)
    x = torch.rand(256, 30, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0003, momentum=0.9)
    fit(run, model, optimizer, batch_loss(model, (x - 0.5, standard(x.mean(1)))), clip=clip)


class Speller(nn.Module):
    """An LSTM that tells the letter after each letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.table = nn.Embedding(letters, 12)
        self.cell = nn.LSTM(12, 32, batch_first=True)
        self.head = nn.Linear(32, letters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (rows, letters, steps) for cross-entropy; x is (rows, steps)."""
        return self.head(self.cell(self.table(x))[0]).transpose(1, 2)  # type: ignore[no-any-return]


def speller(run: Run, *, lr: float) -> None:
    """SGD with momentum on an LSTM that continues repeated words of three letters."""
    text = torch.randint(8, (256, 3)).repeat(1, 8)
    model = Speller(8)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    fit(run, model, optimizer, batch_loss(model, (text[:, :-1], text[:, 1:]), nn.functional.cross_entropy))


def memory(run: Run, *, remembers: bool) -> None:
    """A tanh RNN, or an LSTM with open forget gates, that has to tell after 100 silent steps what the first one was; Adam."""
    model = Reader((nn.LSTM if remembers else nn.RNN)(2, 24, batch_first=True))
    if remembers:
        assert isinstance(model.cell.bias_hh_l0, Tensor)
        with torch.no_grad():
            model.cell.bias_hh_l0[24:48] = 7.0  # torch's order of gates: in, forget, cell, out
    x, y = torch.zeros(256, 100, 2), standard(torch.rand(256, 1))
    x[:, 0] = y * torch.tensor([1.0, -0.5]) + 0.1 * torch.randn(256, 2)
    y += 0.1 * torch.randn(256, 1)
    fit(run, model, torch.optim.Adam(model.parameters(), 0.003), batch_loss(model, (x, y)), clip=1.0)


def summed(run: Run, *, mean: bool) -> None:
    """A GRU that tells the next value of sines at all steps, with Nesterov momentum and the loss summed or averaged."""
    x, _ = waves(length=13)
    cell, head = nn.GRU(1, 16, batch_first=True), nn.Linear(16, 1)
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    run.watch(model)
    while True:
        rows = x[torch.randint(len(x), (32,))]
        optimizer.zero_grad()
        error = (head(cell(rows[:, :-1])[0]) - rows[:, 1:]).square()
        (error.mean() if mean else error.sum()).backward()
        optimizer.step()
        run.step(error.mean())


PROGRAMS: tuple[Program, ...] = (
    Program(
        "tanh RNN with large recurrent weights",
        "recurrent",
        partial(chaotic, gain=3.0, clip=None),
        partial(chaotic, gain=1.0, clip=1.0),
        "Recurrent weights of gain 3 multiply the gradient at each of 60 steps; orthogonal ones of gain 1 and a clip repair it.",
        symptoms=("exploding", "diverging", "nonfinite"),
        suspect="cell.weight_hh_l0",
    ),
    Program(
        "ReLU RNN explodes along the sequence",
        "recurrent",
        partial(growing, gain=1.2, clip=None),
        partial(growing, gain=1.0, clip=10.0),
        "A ReLU RNN whose recurrent weights exceed the identity grows at each step; the identity itself and a clip repair it.",
        symptoms=("exploding", "diverging", "nonfinite"),
        suspect="cell.weight_hh_l0",
    ),
    Program(
        "LSTM with a huge rate",
        "recurrent",
        partial(speller, lr=20.0),
        partial(speller, lr=0.5),
        "A rate of 20 saturates the gates of the LSTM at once; 0.5 learns.",
        symptoms=("exploding", "diverging", "vanishing", "stalled"),
    ),
    Program(
        "tanh RNN forgets over 100 steps",
        "recurrent",
        partial(memory, remembers=False),
        partial(memory, remembers=True),
        "With small recurrent weights the first step's gradient fades over 100; an LSTM with open forget gates keeps it.",
        steps=250,
        symptoms=("vanishing", "stalled"),
        suspect="cell.weight_ih_l0",
    ),
    Program(
        "GRU loss summed over rows and steps",
        "recurrent",
        partial(summed, mean=False),
        partial(summed, mean=True),
        "The loss is summed over 384 values at a rate that was meant for their mean; the mean repairs it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
)
