"""Pieces shared by the faults of data, transformers, optimizer state, injection, plain bugs and games."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Run

Task = tuple[Tensor, Tensor]


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def convnet(classes: int, width: int = 8) -> nn.Sequential:
    """Two convolutions and two linear layers for images of one channel, 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


class Letters(nn.Module):
    """A recurrent model of letters that foretells the next one at each place."""

    def __init__(self, letters: int, width: int = 32, cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.cell = cell(width, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (rows, places, letters)."""
        logits: Tensor = self.head(self.cell(self.embed(x))[0])
        return logits


class Recommender(nn.Module):
    """Ratings from the product of an embedding of the user and one of the item, and a bias of each."""

    def __init__(self, users: int, items: int, width: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.user, self.item, self.user_bias, self.item_bias):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, pairs: Tensor) -> Tensor:
        """Ratings (rows, 1)."""
        user, item = pairs[:, 0], pairs[:, 1]
        product = (self.user(user) * self.item(item)).sum(1, keepdim=True)
        rating: Tensor = product + self.user_bias(user) + self.item_bias(item)
        return rating


class Block(nn.Module):
    """Attention and a feed-forward net, each with its residual path."""

    def __init__(self, width: int, heads: int, norm: Literal["pre", "post", "none"], scale: float) -> None:
        super().__init__()
        self.heads, self.order, self.scale = heads, norm, scale
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1: nn.Module = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.norm2: nn.Module = nn.Identity() if norm == "none" else nn.LayerNorm(width)

    def _attend(self, x: Tensor) -> Tensor:
        rows, places, width = x.shape
        q, k, v = self.qkv(x).view(rows, places, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(-2, -1)) * self.scale
        past = torch.ones(places, places, dtype=torch.bool).tril()
        mixed = logits.masked_fill(~past, -math.inf).softmax(-1) @ v
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, places, width))
        return attended

    def _feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.down(F.gelu(self.up(x)))
        return fed

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        if self.order == "post":
            x = self.norm1(x + self._attend(x))
            after: Tensor = self.norm2(x + self._feed(x))
            return after
        x = x + self._attend(self.norm1(x))
        return x + self._feed(self.norm2(x))


class Gpt(nn.Module):
    """A small causal transformer of letters.

    Args:
        letters: different letters.
        places: length of a sequence.
        norm: where the layer norms are.
        scale: factor of the attention's logits; by default one over the root of a head's width.
        tied: the output shares the embedding's weight.
        embed_std: spread of the embedding's first weights.
    """

    def __init__(
        self,
        letters: int,
        places: int,
        *,
        width: int = 32,
        heads: int = 2,
        blocks: int = 2,
        norm: Literal["pre", "post", "none"] = "pre",
        scale: float | None = None,
        tied: bool = False,
        embed_std: float = 0.2,
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(letters, width), nn.Embedding(places, width)
        nn.init.normal_(self.embed.weight, std=embed_std)
        nn.init.normal_(self.place.weight, std=0.2)
        scale = (width // heads) ** -0.5 if scale is None else scale
        self.blocks = nn.ModuleList(Block(width, heads, norm, scale) for _ in range(blocks))
        self.last: nn.Module = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, letters, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits (rows, places, letters)."""
        stream = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.last(stream))
        return logits


def teacher(rows: int, inputs: int, outputs: int = 1) -> Task:
    """Inputs and standardised answers of a small random tanh net."""
    x = torch.randn(rows, inputs)
    y = torch.tanh(x @ torch.randn(inputs, 8) / math.sqrt(inputs)) @ torch.randn(8, outputs)
    return x, (y - y.mean(0)) / y.std(0)


def patterns(rows: int, classes: int = 6, noise: float = 1.5) -> Task:
    """Images (1, 8, 8) of one pattern a class under noise, and their class."""
    kinds = torch.randn(classes, 1, 8, 8)
    y = torch.randint(classes, (rows,))
    return kinds[y] + noise * torch.randn(rows, 1, 8, 8), y


def markov(rows: int, places: int, letters: int, sharp: float = 3.0) -> Task:
    """Sequences of a Markov chain, and the same one place on."""
    odds = torch.softmax(sharp * torch.randn(letters, letters), 1)
    sequence = torch.randint(letters, (rows, 1))
    for _ in range(places):
        sequence = torch.cat([sequence, torch.multinomial(odds[sequence[:, -1]], 1)], 1)
    return sequence[:, :-1], sequence[:, 1:]


def recall(rows: int, places: int, letters: int) -> Task:
    """Sequences whose second half repeats the first; the answer is the next letter in the second half, else -100."""
    half = torch.randint(letters, (rows, places // 2))
    sequence = torch.cat([half, half], 1)
    x, y = sequence[:, :-1], sequence[:, 1:].clone()
    y[:, : places // 2 - 1] = -100  # what is drawn at random cannot be foretold
    return x, y


def ratings(rows: int, users: int, items: int) -> Task:
    """Pairs of a user and an item, and the rating that hidden tastes give."""
    pairs = torch.stack([torch.randint(users, (rows,)), torch.randint(items, (rows,))], 1)
    taste, trait = torch.randn(users, 3), torch.randn(items, 3)
    y = (taste[pairs[:, 0]] * trait[pairs[:, 1]]).sum(1, keepdim=True) + torch.randn(items, 1)[pairs[:, 1]]
    return pairs, (y - y.mean()) / y.std()


@functools.cache
def _digits() -> Task:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.long)


def digits() -> Task:
    """Scikit-learn's digits: 64 pixels from 0 to 1, and the digit."""
    x, y = _digits()
    return x / 16, y.clone()


def letters_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy over all places that have an answer."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Callable[[Tensor, Tensor], Tensor],
    task: Task,
    *,
    size: int | None = 32,
    begin: Callable[[int], None] | None = None,
    batch: Callable[[int, Tensor, Tensor], Task] | None = None,
    tamper: Callable[[int], None] | None = None,
) -> NoReturn:
    """Train until the run ends.

    Args:
        run: the run.
        model: what is watched and trained.
        optimizer: its optimizer.
        objective: from the model's answer and the target to the loss.
        task: inputs and targets.
        size: rows of a mini-batch; None for all rows.
        begin: called with the step before its forward pass.
        batch: changes the mini-batch of a step.
        tamper: called with the step after its backward pass.
    """
    run.watch(model)
    x, y = task
    while True:
        step = run.made
        if begin is not None:
            begin(step)
        rows = torch.arange(len(x)) if size is None else torch.randint(len(x), (size,))
        inputs, targets = x[rows], y[rows]
        if batch is not None:
            inputs, targets = batch(step, inputs, targets)
        optimizer.zero_grad()
        loss = objective(model(inputs), targets)
        loss.backward()
        if tamper is not None:
            tamper(step)
        optimizer.step()
        run.step(loss)
