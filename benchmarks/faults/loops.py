"""The loop, the data and the small models that the healthy programs share."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from benchmarks.faults.program import Program, Run


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Callable[[], Tensor],
    *,
    schedule: LRScheduler | None = None,
    clip: float | None = None,
) -> NoReturn:
    """Watch the model and train it until the run says that it is done."""
    run.watch(model)
    while True:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        run.step(loss)


def train_before(optimizer: Optimizer, objective: Callable[[], Tensor], steps: int) -> None:
    """Train without being watched: what happened before the run was resumed, or elsewhere."""
    for _ in range(steps):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    optimizer.zero_grad()


def over(batches: Iterator[tuple[Tensor, ...]], loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The loss of the next batch, each time it is asked for."""
    return lambda: loss(*next(batches))


def batches(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches drawn with replacement, without end."""
    while True:
        chosen = torch.randint(len(tensors[0]), (size,))
        yield tuple(tensor[chosen] for tensor in tensors)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits: ``(1797, 64)`` between 0 and 1, and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes, dtype=torch.long)


def images() -> tuple[Tensor, Tensor]:
    """The digits as ``(1797, 1, 8, 8)``, centred, and their classes."""
    pixels, classes = digits()
    return (pixels - 0.3).reshape(-1, 1, 8, 8) * 2.5, classes


def curve(rows: int, inputs: int = 8, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Inputs ``(rows, inputs)`` and a smooth function of them ``(rows, 1)`` of about unit variance."""
    x = torch.randn(rows, inputs)
    y = torch.sin(1.5 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.5 * x[:, 3:].mean(1)
    return x, (y + noise * torch.randn(rows)).unsqueeze(1)


def rings(rows: int) -> tuple[Tensor, Tensor]:
    """Points ``(rows, 2)`` on two rings, and which."""
    which = torch.randint(2, (rows,))
    angle = 2 * math.pi * torch.rand(rows)
    radius = 1.0 + which + 0.1 * torch.randn(rows)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), which


def moons(rows: int, noise: float = 0.05) -> Tensor:
    """Points ``(rows, 2)`` on two half moons."""
    angle = math.pi * torch.rand(rows)
    upper = torch.rand(rows) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x - 0.5, y - 0.25], 1) + noise * torch.randn(rows, 2)


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes, with an activation between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


WORDS = "abcdefghijklmnopqrstuvwxyz ."


def text(sentences: int = 400) -> Tensor:
    """Letters of made-up sentences, as places in `WORDS`."""
    parts = [
        ["a", "the", "one", "some"],
        ["red", "old", "shy", "big"],
        ["cat", "dog", "bird", "fish"],
        ["sees", "eats", "likes"],
    ]
    drawn = [[options[int(torch.randint(len(options), ()))] for options in parts] for _ in range(sentences)]
    return torch.tensor([WORDS.index(letter) for words in drawn for letter in " ".join(words) + ". "])


def windows(size: int, length: int, tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of ``(size, length)`` tokens, and the same one place later."""
    places = torch.arange(length)
    while True:
        start = torch.randint(len(tokens) - length - 1, (size, 1))
        yield tokens[start + places], tokens[start + places + 1]


class Block(nn.Module):
    """A transformer block with the norm before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.feed = mlp(width, 4 * width, width, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + torch.as_tensor(self.feed(self.norm2(x)))


class Transformer(nn.Module):
    """A causal language model; ``tied`` makes the head share the embedding's weights."""

    def __init__(self, tokens: int, length: int, width: int = 32, layers: int = 2, *, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        for module in (self.embed, self.place, self.head):
            nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        place = self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.embed(x) + place)))


class Reader(nn.Module):
    """A recurrent net ``cell`` with a linear head on all its states, or on the last alone."""

    def __init__(self, cell: nn.RNNBase, outputs: int, *, last: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.last = cell, nn.Linear(cell.hidden_size, outputs), last

    def forward(self, x: Tensor) -> Any:
        states, _ = self.cell(x)
        return self.head(states[:, -1] if self.last else states)


def token_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of a model's tokens ``(rows, length, tokens)``."""
    return lambda x, y: functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def healthy(name: str, train: Callable[[Run], None], why: str, steps: int = 300) -> Program:
    """A program of the family that has nothing wrong."""
    from benchmarks.faults.program import Program

    return Program(f"healthy: {name}", "healthy", train, None, why, steps)
