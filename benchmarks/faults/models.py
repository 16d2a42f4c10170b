"""Small models: perceptrons, convolutional and recurrent nets, bags of words and recommenders."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes, with an activation between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


def weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no biases or scales."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def conv(classes: int = 10, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions, a pooling and a linear layer for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        act(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


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


def normed_conv(width: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Two convolutions with a norm after each, the mean over all places and a linear layer, for the ten digits."""
    first = [nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Reader(nn.Module):
    """A recurrent layer ``cell`` and a linear one that reads its last state, or each state where ``last`` is False."""

    def __init__(self, cell: nn.RNNBase, outputs: int = 1, *, last: bool = True) -> None:
        super().__init__()
        self.cell, self.head, self.last = cell, nn.Linear(cell.hidden_size, outputs), last

    def forward(self, x: Tensor) -> Tensor:
        """Predictions of ``(rows, steps, features)``."""
        states, _ = self.cell(x)
        return self.head(states[:, -1] if self.last else states)  # type: ignore[no-any-return]


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


class Bag(nn.Module):
    """The mean of the words' embeddings, and a small network on it."""

    def __init__(self, vocabulary: int = 20, width: int = 16, outputs: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.head = mlp(width, 32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The prediction; x is (rows, words)."""
        return self.head(self.table(x).mean(1))  # type: ignore[no-any-return]


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


def add_score(model: nn.Module) -> Tensor:
    """Make a place in the model where a program keeps how well it does, as such programs often log it."""
    score = torch.zeros(())
    model.register_buffer("score", score)
    return score


class Gates(nn.Module):
    """Twenty gated residual layers, initialised with a gain."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 64) for _ in range(20))
        for block in self.blocks:
            nn.init.normal_(block.weight, std=gain / 32**0.5)  # type: ignore[arg-type]
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        for block in self.blocks:
            x = (x + nn.functional.glu(block(x), 1)) * 0.5**0.5
        out: Tensor = self.out(x)
        return out
