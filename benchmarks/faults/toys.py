"""The toy trainings on which other tools were tried: healthy ones, explosions late, creeping and early, one bad batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.loops import batch_loss, batches, fit, letters_loss, over
from benchmarks.faults.models import mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Run


def _teacher(seed: int, inputs: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(2048, inputs, generator=generator)
    hidden = torch.tanh(x @ torch.randn(inputs, 32, generator=generator) / inputs**0.5)
    return x, hidden @ torch.randn(32, 1, generator=generator) / 32**0.5


_SIZES = (16, 64, 64, 64, 64, 64, 1)


def _healthy(run: Run) -> None:
    """6-layer tanh MLP, AdamW."""
    model = mlp(*_SIZES, act=nn.Tanh)
    fit(run, model, torch.optim.AdamW(model.parameters(), lr=1e-3), batch_loss(model, _teacher(run.seed)))


def _relu(run: Run, rate: Callable[[int], float], *, bad_batch: int = -1, plateau: bool = False) -> None:
    model = mlp(*_SIZES)
    if plateau:  # small weights: learning begins only after some hundred steps
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.85)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=0.9)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(x), y * (200 if run.made == bad_batch else 1))

    fit(run, model, optimizer, over(batches(32, *_teacher(run.seed)), loss), rate=rate)


def _gpt(run: Run) -> None:
    """2-layer transformer, warm-up and cosine."""
    length, words = 24, 32

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, 48), nn.Embedding(length, 48)
            self.blocks = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True),
                2,
                enable_nested_tensor=False,
            )
            self.head = nn.Linear(48, words)

        def forward(self, tokens: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            hidden = self.blocks(self.words(tokens) + self.places(torch.arange(tokens.shape[1])), mask=mask)
            logits: Tensor = self.head(hidden)
            return logits

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / 400)))
    )
    chain = torch.softmax(3 * torch.randn(words, words), dim=1)

    def loss() -> Tensor:
        tokens = [torch.randint(0, words, (16,))]
        for _ in range(length):
            tokens.append(torch.multinomial(chain[tokens[-1]], 1)[:, 0])
        batch = torch.stack(tokens, dim=1)
        return letters_loss(model(batch[:, :-1]), batch[:, 1:])

    fit(run, model, optimizer, loss, schedule=schedule)


@dataclass(frozen=True)
class Toy:
    """One of them; ``onset`` is the step of the cause, None where there is none."""

    name: str
    train: Callable[[Run], None]
    onset: int | None = None
    seeds: int = 6


_RATE = 0.01
TOYS = (
    Toy("healthy", _healthy),
    Toy("healthy_relu", lambda run: _relu(run, lambda _: _RATE, plateau=True)),
    Toy("healthy_gpt", _gpt, seeds=3),
    Toy("late", lambda run: _relu(run, lambda step: _RATE * (60 if step >= 200 else 1)), 200),
    Toy("creep", lambda run: _relu(run, lambda step: _RATE * 1.05 ** max(0, step - 200)), 200),
    Toy("early", lambda run: _relu(run, lambda _: 2.0), 0),
    Toy("badbatch", lambda run: _relu(run, lambda _: 0.003, bad_batch=200), 200),
)
STEPS = 400
