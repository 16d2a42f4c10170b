"""Healthy trainings on sequences, words and tokens: nothing is wrong with any, and each has something that looks wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.attention import Transformer
from benchmarks.faults.data import ALPHABET, rings, text
from benchmarks.faults.loops import batches, fit, letters_loss, over, windows
from benchmarks.faults.models import Reader, mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _waves(rows: int, length: int, noise: float = 0.1) -> Tensor:
    """Sums of two sines of random period and phase ``(rows, length, 1)``."""
    time = torch.arange(length).float()
    rate, phase = 0.1 + 0.4 * torch.rand(2, rows, 1), 2 * math.pi * torch.rand(2, rows, 1)
    return ((rate * time + phase).sin().sum(0) + noise * torch.randn(rows, length)).unsqueeze(2)


def _forecast(run: Run) -> None:
    data = _waves(300, 31)
    model = Reader(nn.GRU(1, 24, batch_first=True), 1, last=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(32, data), lambda x: _square(model(x[:, :-1]), x[:, 1:])))


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


def _spoken(run: Run) -> None:
    """Five letters, each held for some frames with noise, to be read by CTC without knowing where each lies."""
    shapes = torch.randn(6, 8)
    model = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 7, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    lengths, letters = torch.full((16,), 20), torch.full((16,), 5)

    def loss() -> Tensor:
        target = torch.stack([torch.randperm(6)[:5] for _ in range(16)])
        frames = shapes[target.repeat_interleave(4, 1)] + 0.3 * torch.randn(16, 20, 8)
        scores = model(frames.transpose(1, 2)).permute(2, 0, 1).log_softmax(2)
        return functional.ctc_loss(scores, target + 1, lengths, letters)

    fit(run, model, optimizer, loss)


def _warmed(steps: int, warm: int) -> Any:
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _transformer(run: Run) -> None:
    model = Transformer(len(ALPHABET), 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = lr_scheduler.LambdaLR(optimizer, _warmed(run.steps, 30))
    fit(
        run,
        model,
        optimizer,
        over(windows(12, 24, text()), lambda x, y: letters_loss(model(x), y)),
        schedule=schedule,
        clip=1.0,
    )


def _tied(run: Run) -> None:
    model = Transformer(len(ALPHABET), 16, tied=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    fit(run, model, optimizer, over(windows(16, 16, text()), lambda x, y: letters_loss(model(x), y)))


def _copying(length: int, tokens: int) -> Iterator[tuple[Tensor, ...]]:
    """A random half, then the same again: nothing can be foretold of the first, all of the second."""
    while True:
        half = torch.randint(tokens, (16, length))
        whole = torch.cat([half, half], 1)
        yield whole[:, :-1], whole[:, 1:]


def _induction(run: Run) -> None:
    model = Transformer(8, 15, width=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return _entropy(model(x)[:, 8:].flatten(0, 1), y[:, 8:].flatten())

    fit(run, model, optimizer, over(_copying(8, 8), loss), clip=1.0)


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


class _Flow(nn.Module):
    """One small net, applied twelve times with a step of 1/6: a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = mlp(4, 32, 4, act=nn.Tanh), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = functional.pad(x, (0, 2))
        for _ in range(12):
            x = x + self.field(x) / 6
        return self.head(x)


def _neural_ode(run: Run) -> None:
    x, y = rings(800)
    model = _Flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


def _plain_rnn(run: Run) -> None:
    x = torch.randn(500, 12, 3)
    y = torch.tanh(x[:, -4:, 0].sum(1, keepdim=True)) + 0.5 * x[:, -1, 1:2]
    cell = nn.RNN(3, 32, batch_first=True)
    nn.init.orthogonal_(dict(cell.named_parameters())["weight_hh_l0"])
    model = Reader(cell, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _square(model(x), y)), clip=1.0)


def _truncated(run: Run) -> None:
    """A state carried on from window to window, cut off from the backward."""
    stream = _waves(16, 20 * 40 + 1, noise=0.05)
    cell, head = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1)
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state: tuple[Tensor, Tensor] | None = None

    def loss() -> Tensor:
        nonlocal state
        start = run.made % 40 * 20
        if start == 0:
            state = None
        x = stream[:, start : start + 21]
        out, carried = cell(x[:, :-1], state)
        state = carried[0].detach(), carried[1].detach()
        return _square(head(out), x[:, 1:])

    fit(run, model, optimizer, loss)


def _causal_conv(run: Run) -> None:
    data = _waves(300, 49, noise=0.05).transpose(1, 2)
    layers: list[nn.Module] = []
    for inputs, spread in ((1, 1), (24, 2), (24, 4)):
        layers += [nn.ZeroPad1d((2 * spread, 0)), nn.Conv1d(inputs, 24, 3, dilation=spread), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv1d(24, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(32, data), lambda x: _square(model(x[:, :, :-1]), x[:, :, 1:])))


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


def _tuned(run: Run) -> None:
    """A language model trained elsewhere, tuned at a low rate to tell classes apart, its blocks slower than its head."""
    tokens = text()
    base = Transformer(len(ALPHABET), 16)
    before = torch.optim.Adam(base.parameters(), lr=0.005)
    objective = over(windows(8, 16, tokens), lambda x, y: letters_loss(base(x), y))
    for _ in range(100):
        before.zero_grad()
        objective().backward()
        before.step()
    base.head = nn.Linear(32, 2)
    groups = [
        {"params": base.head.parameters(), "lr": 0.01},
        {"params": [value for name, value in base.named_parameters() if not name.startswith("head")], "lr": 0.0003},
    ]
    optimizer = torch.optim.AdamW(groups)

    def loss(x: Tensor, _: Tensor) -> Tensor:
        return _entropy(base(x).mean(1), (x == ALPHABET.index("d")).any(1).long())

    fit(run, base, optimizer, over(windows(16, 16, tokens), loss))


PROGRAMS: tuple[Program, ...] = (
    healthy("waves by GRU", _forecast, "The loss stalls at the noise, early."),
    healthy(
        "long memory by LSTM", _long_lstm, "A plateau at chance, then a sudden drop with gradients that need the clip."
    ),
    healthy("letters by GRU", _letters, "The loss stalls at what cannot be foretold."),
    healthy("letters by LSTM, clipped SGD", _letters_sgd, "A rate of 2, and a clip that acts in most steps."),
    healthy("speech-like CTC", _spoken, "Loss and gradients fall a thousandfold."),
    healthy(
        "transformer, warm-up and cosine",
        _transformer,
        "The rate climbs thirtyfold and ends at zero, and the clip acts in most steps.",
    ),
    healthy("tied embeddings", _tied, "One tensor has the gradients of both ends of the net."),
    healthy(
        "copying by attention", _induction, "Loss and gradients fall from chance to almost nothing, and quickly.", 400
    ),
    healthy("masked letters", _masked, "A changing share of hidden letters makes the loss jump."),
    healthy("sparse bags, SparseAdam", _sparse_adam, "Sparse gradients, of other rows in each step."),
    healthy("sparse embedding, SGD", _sparse_sgd, "Sparse gradients beside dense ones."),
    healthy(
        "skip-gram from tiny weights",
        _skip_gram,
        "Half of the weights start at zero, the rest tiny, and grow many-fold.",
    ),
    healthy("matrix factors from tiny weights", _matrix, "A saddle at the start: nothing for long, then a fast drop."),
    healthy("sums, sequences doubling", _doubling, "Three times the length doubles, and the loss jumps."),
    healthy("one block twelve times", _neural_ode, "Gradients of twelve passes add up in one block."),
    healthy("plain recurrent net", _plain_rnn, "Recurrent nets often explode; this one is short and orthogonal."),
    healthy("state carried on", _truncated, "Every 40 steps the state is empty again and the loss jumps."),
    healthy("dilated convolutions", _causal_conv, "The loss falls fast, then stalls at the noise."),
    healthy("reversing with attention", _reversing, "The loss falls from chance to almost nothing."),
    healthy(
        "sums over uneven lengths", _uneven, "Loss and gradients differ twentyfold between short and long batches."
    ),
    healthy("tuned transformer", _tuned, "A new head with large gradients on blocks that hardly move."),
)
