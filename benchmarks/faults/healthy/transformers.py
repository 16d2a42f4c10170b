"""Healthy transformers: with warm-up, with tied embeddings, copying, and tuned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from benchmarks.faults.attention import Transformer
from benchmarks.faults.data import ALPHABET, text
from benchmarks.faults.loops import fit, letters_loss, over, windows
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.faults.program import Run

_entropy = functional.cross_entropy


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
    healthy(
        "transformer, warm-up and cosine",
        _transformer,
        "The rate climbs thirtyfold and ends at zero, and the clip acts in most steps.",
    ),
    healthy("tied embeddings", _tied, "One tensor has the gradients of both ends of the net."),
    healthy(
        "copying by attention", _induction, "Loss and gradients fall from chance to almost nothing, and quickly.", 400
    ),
    healthy("tuned transformer", _tuned, "A new head with large gradients on blocks that hardly move."),
)
