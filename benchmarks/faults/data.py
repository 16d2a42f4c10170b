"""Data that can be learned: tables, points, images, waves, sentences and ratings, drawn by the seed of the run."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

Data = tuple[Tensor, Tensor]
ALPHABET = "abcdefghijklmnopqrstuvwxyz ."


def standard(values: Tensor) -> Tensor:
    """The columns with mean 0 and deviation 1."""
    return (values - values.mean(0)) / values.std(0)


# Tables and points.


def friedman(rows: int = 512) -> Data:
    """Friedman's first formula: ten features in -1.7 .. 1.7, of which five matter, and one standard target."""
    x = torch.rand(rows, 10)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return (x - 0.5) * math.sqrt(12), standard(y[:, None])


def teacher(rows: int = 512, inputs: int = 8, outputs: int = 1, hidden: int = 8) -> Data:
    """Normal features and the standardised outputs of a random tanh network."""
    x = torch.randn(rows, inputs)
    y = torch.tanh(x @ torch.randn(inputs, hidden) / math.sqrt(inputs)) @ torch.randn(hidden, outputs)
    return x, standard(y)


def clusters(rows: int = 512, features: int = 8, classes: int = 5, apart: float = 2.0) -> Data:
    """Normal clouds around random centres, and the number of each row's cloud."""
    y = torch.randint(classes, (rows,))
    return (torch.randn(classes, features) * apart)[y] + torch.randn(rows, features), y


def curve(rows: int, inputs: int = 8, noise: float = 0.1) -> Data:
    """Inputs ``(rows, inputs)`` and a smooth function of them ``(rows, 1)`` of about unit variance."""
    x = torch.randn(rows, inputs)
    y = torch.sin(1.5 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.5 * x[:, 3:].mean(1)
    return x, (y + noise * torch.randn(rows)).unsqueeze(1)


def rings(rows: int) -> Data:
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


# Images.


@cache
def digits() -> Data:
    """1797 handwritten digits: ``(1797, 64)`` between 0 and 1, and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes, dtype=torch.long)


def digit_images() -> Data:
    """The digits as images ``(1797, 1, 8, 8)`` between 0 and 1, and their classes."""
    pixels, classes = digits()
    return pixels.view(-1, 1, 8, 8), classes


def centred_images() -> Data:
    """The digits as images ``(1797, 1, 8, 8)``, centred, and their classes."""
    pixels, classes = digits()
    return (pixels - 0.3).reshape(-1, 1, 8, 8) * 2.5, classes


def bars(rows: int = 512) -> Data:
    """Noisy 8 x 8 images of one bar, and its direction: across, down or along a diagonal."""
    y, at, along = torch.randint(3, (rows,)), torch.randint(8, (rows,)), torch.arange(8)
    x = 0.3 * torch.randn(rows, 1, 8, 8)
    for image, kind, place in zip(x, y.tolist(), at.tolist(), strict=True):
        row = torch.full((8,), place) if kind == 0 else along
        column = (along, torch.full((8,), place), (along + place) % 8)[kind]
        image[0, row, column] += 1.0
    return x, y


def patterns(rows: int, classes: int = 6, noise: float = 1.5) -> Data:
    """Images (1, 8, 8) of one pattern a class under noise, and their class."""
    kinds = torch.randn(classes, 1, 8, 8)
    y = torch.randint(classes, (rows,))
    return kinds[y] + noise * torch.randn(rows, 1, 8, 8), y


# Sequences, words and ratings.


def waves(rows: int = 256, length: int = 40) -> Data:
    """Sines of random pitch and phase with a little noise, and the value after the last."""
    pitch, phase = 0.2 + 0.4 * torch.rand(rows, 1), 6.28 * torch.rand(rows, 1)
    wave = torch.sin(pitch * torch.arange(length + 1) + phase)
    return (wave[:, :-1] + 0.02 * torch.randn(rows, length))[..., None], wave[:, -1:]


def markov(rows: int, places: int, letters: int, sharp: float = 3.0) -> Data:
    """Sequences of a Markov chain, and the same one place on."""
    odds = torch.softmax(sharp * torch.randn(letters, letters), 1)
    sequence = torch.randint(letters, (rows, 1))
    for _ in range(places):
        sequence = torch.cat([sequence, torch.multinomial(odds[sequence[:, -1]], 1)], 1)
    return sequence[:, :-1], sequence[:, 1:]


def recall(rows: int, places: int, letters: int) -> Data:
    """Sequences whose second half repeats the first; the answer is the next letter in the second half, else -100."""
    half = torch.randint(letters, (rows, places // 2))
    sequence = torch.cat([half, half], 1)
    x, y = sequence[:, :-1], sequence[:, 1:].clone()
    y[:, : places // 2 - 1] = -100  # what is drawn at random cannot be foretold
    return x, y


def words(rows: int = 512, length: int = 8, vocabulary: int = 20) -> Data:
    """Sentences of random words, and the standardised sum of their words' hidden values."""
    x = torch.randint(vocabulary, (rows, length))
    return x, standard(torch.randn(vocabulary)[x].sum(1, keepdim=True))


def text(sentences: int = 400) -> Tensor:
    """Letters of made-up sentences, as places in `ALPHABET`."""
    parts = [
        ["a", "the", "one", "some"],
        ["red", "old", "shy", "big"],
        ["cat", "dog", "bird", "fish"],
        ["sees", "eats", "likes"],
    ]
    drawn = [[options[int(torch.randint(len(options), ()))] for options in parts] for _ in range(sentences)]
    return torch.tensor([ALPHABET.index(letter) for words in drawn for letter in " ".join(words) + ". "])


def ratings(rows: int, users: int, items: int) -> Data:
    """Pairs of a user and an item, and the rating that hidden tastes give."""
    pairs = torch.stack([torch.randint(users, (rows,)), torch.randint(items, (rows,))], 1)
    taste, trait = torch.randn(users, 3), torch.randn(items, 3)
    y = (taste[pairs[:, 0]] * trait[pairs[:, 1]]).sum(1, keepdim=True) + torch.randn(items, 1)[pairs[:, 1]]
    return pairs, (y - y.mean()) / y.std()
