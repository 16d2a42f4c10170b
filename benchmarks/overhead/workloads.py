"""Six shapes of training, from one that is all Python to one that is all arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

_POOL = 64  # batches of noise: nothing to be learned by heart, so that the gradients stay what they are


@dataclass(frozen=True)
class Workload:
    """A model, and one forward that returns the loss of a batch."""

    title: str
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]


def _supervised(model: nn.Module, x: Tensor, outputs: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    pool = itertools.cycle([(x[torch.randperm(len(x))], torch.randn(len(x), outputs)) for _ in range(_POOL)])

    def loss() -> Tensor:
        inputs, targets = next(pool)
        return nn.functional.mse_loss(model(inputs), targets)

    return model, loss


def _tiny() -> Any:
    return _supervised(nn.Sequential(nn.Linear(20, 25), nn.ReLU(), nn.Linear(25, 1)), torch.randn(32, 20), 1)


def _deep() -> Any:
    parts = [part for _ in range(49) for part in (nn.Linear(128, 128), nn.ReLU())]
    return _supervised(nn.Sequential(*parts, nn.Linear(128, 1)), torch.randn(32, 128), 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(inputs, width, 1, stride, bias=False) if stride > 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        out = torch.relu(self.norm1(self.one(x)))
        return torch.relu(self.norm2(self.two(out)) + self.short(x))


def _resnet() -> Any:
    widths = ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1))
    blocks, inputs = [], 16
    for width, stride in widths:
        blocks.append(_Block(inputs, width, stride))
        inputs = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return _supervised(nn.Sequential(stem, *blocks, head), torch.randn(32, 3, 32, 32), 10)


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 256, 2, batch_first=True), nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


def _lstm() -> Any:
    return _supervised(_Last(), torch.randn(16, 64, 64), 1)


def _gpt(layers: int, width: int, length: int, batch: int, words: int) -> Any:
    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(layers)
            )
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

        def forward(self, tokens: Tensor) -> Any:
            x = self.words(tokens) + self.places(torch.arange(length))
            for block in self.blocks:
                x = block(x, src_mask=mask, is_causal=True)
            return self.head(self.norm(x))

    mask = nn.Transformer.generate_square_subsequent_mask(length)
    model = Gpt()
    pool = itertools.cycle([torch.randint(0, words, (batch, length + 1)) for _ in range(_POOL)])

    def loss() -> Tensor:
        tokens = next(pool)
        return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


WORKLOADS = {
    "a": Workload("20-25-1 MLP, batch 32", _tiny),
    "b": Workload("50-layer MLP, width 128", _deep),
    "c": Workload("small ResNet, 32x32, batch 32", _resnet),
    "d": Workload("two-layer LSTM, sequence 64, hidden 256", _lstm),
    "e": Workload("GPT, 6 layers, d 256, sequence 128, batch 8", lambda: _gpt(6, 256, 128, 8, 512)),
    "f": Workload("GPT, 24 layers, d 192, 292 tensors, batch 1", lambda: _gpt(24, 192, 32, 1, 512)),
}
