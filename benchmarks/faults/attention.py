"""Two causal transformers: one whose norms and scale can be set, and one with the attention of torch."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.models import mlp


class _Block(nn.Module):
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
        fed: Tensor = self.down(functional.gelu(self.up(x)))
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
        self.blocks = nn.ModuleList(_Block(width, heads, norm, scale) for _ in range(blocks))
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


class _TorchBlock(nn.Module):
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
        self.blocks = nn.Sequential(*(_TorchBlock(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        for module in (self.embed, self.place, self.head):
            nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        place = self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.embed(x) + place)))
