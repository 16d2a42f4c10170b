"""Faults of the data: missing values, outliers, wrong scales and lost labels."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from benchmarks.faults.data import digits, patterns, ratings, teacher
from benchmarks.faults.loops import batch_loss, batches, fit, over
from benchmarks.faults.models import Recommender, convnet, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def nan_rows(run: Run, *, faulty: bool) -> None:
    """An autoencoder of digits; from step 150 one row in fifty has a missing pixel."""
    x, _ = digits()
    model = mlp(64, 32, 8, 32, 64, act=nn.Tanh)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        if run.made >= 150:
            inputs = inputs.clone()
            inputs[torch.rand(len(inputs)) < 0.02, 20] = torch.nan
        whole = inputs if faulty else inputs.nan_to_num(0.0)
        return F.mse_loss(model(whole), whole if faulty else targets)

    fit(run, model, torch.optim.Adam(model.parameters(), 5e-3), over(batches(32, x, x), loss))


def outliers(run: Run, *, faulty: bool) -> None:
    """A conv net measures images; from step 120 one target in fifty is 1e4."""
    x, kind = patterns(1000)
    y = (kind[:, None] - 2.5) / 1.7
    model = convnet(1)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        if run.made >= 120:
            targets = torch.where(torch.rand_like(targets) < 0.02, 1e4, targets)
        keep = torch.ones(len(targets), dtype=torch.bool) if faulty else targets[:, 0] < 10
        return F.mse_loss(model(inputs[keep]), targets[keep])

    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    fit(run, model, optimizer, over(batches(32, x, y), loss))


def raw_inputs(run: Run, *, faulty: bool) -> None:
    """A ReLU net by SGD on columns around a thousand."""
    x, y = teacher(1000, 10)
    x = 1000 + 300 * x
    if not faulty:
        x = (x - x.mean(0)) / x.std(0)
    model = mlp(10, 48, 48, 1)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.05), batch_loss(model, (x, y)))


def lost_labels(run: Run, *, faulty: bool) -> None:
    """A conv net whose loader shuffles images and labels apart from each other."""
    x, y = patterns(1000)
    model = convnet(6)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), targets[torch.randperm(len(targets))] if faulty else targets)

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    fit(run, model, optimizer, over(batches(32, x, y), loss))


def divided_twice(run: Run, *, faulty: bool) -> None:
    """A net of digits whose pixels are divided by 255 once more though they were already from 0 to 1."""
    x, y = digits()
    x = x / 255 if faulty else x
    model = mlp(64, 48, 32, 10)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batch_loss(model, (x, y), F.cross_entropy))


def prices(run: Run, *, faulty: bool) -> None:
    """A recommender by Adagrad whose targets are prices around 1e5."""
    pairs, y = ratings(3000, 40, 40)
    model = Recommender(40, 40)
    y = 1e5 + 3e4 * y if faulty else y
    fit(run, model, torch.optim.Adagrad(model.parameters(), 0.3), batch_loss(model, (pairs, y), size=128))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "missing pixels from step 150",
        "data",
        partial(nan_rows, faulty=True),
        partial(nan_rows, faulty=False),
        "Some rows of a later shard have a NaN; filling the missing pixels repairs it.",
        onset=150,
        symptoms=("nonfinite",),
    ),
    Program(
        "targets with outliers from step 120",
        "data",
        partial(outliers, faulty=True),
        partial(outliers, faulty=False),
        "One target in fifty is 1e4 under a squared error; leaving those rows out repairs it.",
        onset=120,
        symptoms=("exploding", "spike", "diverging", "nonfinite"),
    ),
    Program(
        "inputs around a thousand",
        "data",
        partial(raw_inputs, faulty=True),
        partial(raw_inputs, faulty=False),
        "The columns are not scaled, so that plain SGD explodes; standardising them repairs it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "labels shuffled apart from images",
        "data",
        partial(lost_labels, faulty=True),
        partial(lost_labels, faulty=False),
        "Images and labels do not belong together, so that nothing can be learned; shuffling them together repairs it.",
        symptoms=("stalled",),
    ),
    Program(
        "pixels divided by 255 twice",
        "data",
        partial(divided_twice, faulty=True),
        partial(divided_twice, faulty=False),
        "The inputs are so small that the net cannot tell them apart; dividing once repairs it.",
        symptoms=("stalled", "vanishing", "dead"),
    ),
    Program(
        "targets around 1e5",
        "data",
        partial(prices, faulty=True),
        partial(prices, faulty=False),
        "Targets of a huge scale are out of reach of the rate; standardising them repairs it.",
        symptoms=("stalled", "exploding"),
    ),
)
