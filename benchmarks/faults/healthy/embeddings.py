"""Healthy trainings of embeddings: masked letters, sparse gradients, words and matrix factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import ALPHABET, text
from benchmarks.faults.loops import batches, fit, over, windows
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _masked(run: Run) -> None:
    tokens = text()
    model = nn.Sequential(
        nn.Embedding(len(ALPHABET) + 1, 24),
        nn.Flatten(1),
        nn.Linear(24 * 12, 96),
        nn.GELU(),
        nn.Linear(96, 12 * len(ALPHABET)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor, _: Tensor) -> Tensor:
        hidden = torch.rand(x.shape) < 0.05 + 0.3 * torch.rand(())  # from almost none to a third
        hidden[0, 0] = True
        scores = model(x.masked_fill(hidden, len(ALPHABET))).reshape(*x.shape, -1)
        return _entropy(scores[hidden], x[hidden])

    fit(run, model, optimizer, over(windows(32, 12, tokens), loss))


def _zipf(rows: int, words: int, per_row: int) -> Tensor:
    return torch.multinomial(1 / torch.arange(1, words + 1), rows * per_row, replacement=True).reshape(rows, per_row)


class _Bag(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(words, width, sparse=True), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embed(x))


def _sparse_adam(run: Run) -> None:
    x = _zipf(2000, 500, 12)
    y = (torch.randn(500)[x].sum(1) > 0).long()
    model = _Bag(500, 16)
    sparse = torch.optim.SparseAdam(list(model.embed.parameters()), lr=0.02)
    dense = torch.optim.Adam(model.head.parameters(), lr=0.01)
    data = batches(64, x, y)
    run.watch(model)
    while True:
        sparse.zero_grad()
        dense.zero_grad()
        words, classes = next(data)
        loss = _entropy(model(words), classes)
        loss.backward()
        sparse.step()
        dense.step()
        run.step(loss)


def _sparse_sgd(run: Run) -> None:
    tokens = text()
    model = nn.Sequential(
        nn.Embedding(len(ALPHABET), 12, sparse=True), nn.Flatten(1), nn.Linear(36, 64), nn.Tanh(), nn.Linear(64, 28)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    fit(run, model, optimizer, over(windows(16, 3, tokens), lambda x, y: _entropy(model(x), y[:, -1])))


class _Word2Vec(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(words, width), nn.Embedding(words, width)
        nn.init.uniform_(self.inner.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, word: Tensor, others: Tensor) -> Tensor:
        return torch.einsum("nd,nkd->nk", self.inner(word), self.outer(others))


def _skip_gram(run: Run) -> None:
    model = _Word2Vec(100, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    truth = torch.zeros(256, 6)
    truth[:, 0] = 1

    def loss() -> Tensor:
        word = torch.randint(100, (256,))
        near = word // 10 * 10 + torch.randint(10, (256,))  # ten topics of ten words
        scores = model(word, torch.cat([near.unsqueeze(1), torch.randint(100, (256, 5))], 1))
        return functional.binary_cross_entropy_with_logits(scores, truth)

    fit(run, model, optimizer, loss)


def _matrix(run: Run) -> None:
    seen = torch.randn(80, 4) @ torch.randn(4, 60)
    model = _Word2Vec(80, 8)
    nn.init.normal_(model.outer.weight, std=0.05)
    nn.init.normal_(model.inner.weight, std=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def loss() -> Tensor:
        row, column = torch.randint(80, (128,)), torch.randint(60, (128, 1))
        return _square(model(row, column), seen[row.unsqueeze(1), column])

    fit(run, model, optimizer, loss)


PROGRAMS: tuple[Program, ...] = (
    healthy("masked letters", _masked, "A changing share of hidden letters makes the loss jump."),
    healthy("sparse bags, SparseAdam", _sparse_adam, "Sparse gradients, of other rows in each step."),
    healthy("sparse embedding, SGD", _sparse_sgd, "Sparse gradients beside dense ones."),
    healthy(
        "skip-gram from tiny weights",
        _skip_gram,
        "Half of the weights start at zero, the rest tiny, and grow many-fold.",
    ),
    healthy("matrix factors from tiny weights", _matrix, "A saddle at the start: nothing for long, then a fast drop."),
)
