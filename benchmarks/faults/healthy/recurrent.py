"""Healthy recurrent networks: long memory, letters, sums and reversals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import ALPHABET, text
from benchmarks.faults.loops import batches, fit, letters_loss, over, windows
from benchmarks.faults.models import Reader
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _long_lstm(run: Run) -> None:
    x = torch.randn(400, 60, 2) * 0.1
    x[:, :, 1] = 0
    first = torch.randint(2, (400,))
    x[torch.arange(400), torch.randint(10, (400,)), 1] = (
        2.0 * first - 1
    )  # the one mark that counts comes 50 steps or more before the end
    cell = nn.LSTM(2, 24, batch_first=True)
    start = nn.Parameter(torch.tensor([-2.0, 4.0, 0.0, 0.0]).repeat_interleave(24))
    cell.bias_hh_l0 = start  # the forget gate starts open, the input gate almost closed
    model = Reader(cell, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(32, x, first), lambda x, y: _entropy(model(x), y)), clip=1.0)


def _letters(run: Run) -> None:
    model = nn.Sequential(
        nn.Embedding(len(ALPHABET), 16), Reader(nn.GRU(16, 48, batch_first=True), len(ALPHABET), last=False)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(windows(16, 24, text()), lambda x, y: letters_loss(model(x), y)))


def _letters_sgd(run: Run) -> None:
    model = nn.Sequential(
        nn.Embedding(len(ALPHABET), 16), Reader(nn.LSTM(16, 48, batch_first=True), len(ALPHABET), last=False)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.5)
    fit(run, model, optimizer, over(windows(16, 24, text()), lambda x, y: letters_loss(model(x), y)), clip=0.1)


def _doubling(run: Run) -> None:
    """Sums of marked numbers, over sequences of 5, 10, 20 and 40."""
    model = Reader(nn.GRU(2, 24, batch_first=True), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        length = 5 * 2 ** (4 * run.made // run.steps)
        numbers, marks = torch.rand(48, length), torch.zeros(48, length)
        marks[:, torch.randperm(length)[:2]] = 1
        return _square(model(torch.stack([numbers, marks], 2)), (numbers * marks).sum(1, keepdim=True))

    fit(run, model, optimizer, loss)


def _plain_rnn(run: Run) -> None:
    x = torch.randn(500, 12, 3)
    y = torch.tanh(x[:, -4:, 0].sum(1, keepdim=True)) + 0.5 * x[:, -1, 1:2]
    cell = nn.RNN(3, 32, batch_first=True)
    nn.init.orthogonal_(dict(cell.named_parameters())["weight_hh_l0"])
    model = Reader(cell, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _square(model(x), y)), clip=1.0)


class _Translator(nn.Module):
    """Reads with one GRU, writes with another that attends to the first."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens + 1, width)  # one more, to begin with
        self.reader, self.writer = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width, tokens)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        read, state = self.reader(self.embed(x))
        begin = torch.full_like(y[:, :1], self.embed.num_embeddings - 1)
        wrote, _ = self.writer(self.embed(torch.cat([begin, y[:, :-1]], 1)), state)
        return self.head(torch.cat([wrote, functional.scaled_dot_product_attention(wrote, read, read)], 2))


def _reversing(run: Run) -> None:
    model = _Translator(10, 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        x = torch.randint(10, (48, 6))
        y = x.flip(1)
        return _entropy(model(x, y).flatten(0, 1), y.flatten())

    fit(run, model, optimizer, loss)


def _uneven(run: Run) -> None:
    """Summed loss over sequences of very unequal length."""
    tokens = text()
    model = nn.Sequential(
        nn.Embedding(len(ALPHABET), 16), Reader(nn.GRU(16, 40, batch_first=True), len(ALPHABET), last=False)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        x, y = next(windows(8, int(torch.randint(2, 41, ())), tokens))
        return _entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / 8

    fit(run, model, optimizer, loss)


PROGRAMS: tuple[Program, ...] = (
    healthy(
        "long memory by LSTM", _long_lstm, "A plateau at chance, then a sudden drop with gradients that need the clip."
    ),
    healthy("letters by GRU", _letters, "The loss stalls at what cannot be foretold."),
    healthy("letters by LSTM, clipped SGD", _letters_sgd, "A rate of 2, and a clip that acts in most steps."),
    healthy("sums, sequences doubling", _doubling, "Three times the length doubles, and the loss jumps."),
    healthy("plain recurrent net", _plain_rnn, "Recurrent nets often explode; this one is short and orthogonal."),
    healthy("reversing with attention", _reversing, "The loss falls from chance to almost nothing."),
    healthy(
        "sums over uneven lengths", _uneven, "Loss and gradients differ twentyfold between short and long batches."
    ),
)
