"""Damage to one known layer, drawn later than the others: weights, optimizer state, rates and gradients."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn

from benchmarks.faults.attention import Gpt
from benchmarks.faults.data import digits, markov, patterns, ratings, teacher
from benchmarks.faults.faulty.injected import flip_bit
from benchmarks.faults.loops import batch_loss, fit, letters_loss
from benchmarks.faults.models import Recommender, convnet, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def inflated(run: Run, *, faulty: bool) -> None:
    """A tanh net; at step 100 the weights of its second layer are multiplied by 30."""
    model = mlp(64, 48, 48, 32, 10, act=nn.Tanh)

    def begin(step: int) -> None:
        if faulty and step == 100:
            model.get_parameter("2.weight").data.mul_(30)

    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        batch_loss(model, digits(), F.cross_entropy),
        begin=begin,
    )


def one_unit(run: Run, *, faulty: bool) -> None:
    """A transformer; at step 265 one row of the first block's output weights becomes 100."""
    model = Gpt(12, 12)

    def begin(step: int) -> None:
        if faulty and step == 265:
            model.get_parameter("blocks.0.down.weight").data[0] = 100.0

    fit(
        run,
        model,
        torch.optim.AdamW(model.parameters(), 3e-3),
        batch_loss(model, markov(1000, 12, 12), letters_loss),
        begin=begin,
    )


def flipped_embedding(run: Run, *, faulty: bool) -> None:
    """A recommender; at step 150 the highest exponent bit of one element of its table of items flips."""
    model = Recommender(40, 40)
    table = model.get_parameter("item.weight")

    def begin(step: int) -> None:
        if faulty and step == 150:
            flip_bit(table, int(table.detach().flatten().argmax()))

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fit(run, model, optimizer, batch_loss(model, ratings(3000, 40, 40), size=128), begin=begin)


def momentum(run: Run, *, faulty: bool) -> None:
    """A regression net; at step 150 the momentum of its third layer is multiplied by a million."""
    model = mlp(10, 32, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)

    def begin(step: int) -> None:
        if faulty and step == 150:
            optimizer.state[model.get_parameter("4.weight")]["momentum_buffer"].mul_(1e6)

    fit(run, model, optimizer, batch_loss(model, teacher(1000, 10)), begin=begin)


def first_moment(run: Run, *, faulty: bool) -> None:
    """A conv net; at step 150 Adam's first moment of its second convolution is multiplied by ten thousand."""
    model = convnet(6)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def begin(step: int) -> None:
        if faulty and step == 150:
            optimizer.state[model.get_parameter("3.weight")]["exp_avg"].mul_(1e4)

    fit(run, model, optimizer, batch_loss(model, patterns(1000), F.cross_entropy), begin=begin)


def one_rate(run: Run, *, faulty: bool) -> None:
    """A recommender; from step 100 on the rate of its table of items is a thousand times as high."""
    model = Recommender(40, 40)
    items = model.get_parameter("item.weight")
    others = [parameter for parameter in model.parameters() if parameter is not items]
    optimizer = torch.optim.SGD([{"params": others}, {"params": [items]}], 0.5)

    def begin(step: int) -> None:
        if faulty and step == 100:
            optimizer.param_groups[1]["lr"] = 500.0

    fit(run, model, optimizer, batch_loss(model, ratings(3000, 40, 40), size=128), begin=begin)


def one_gradient(run: Run, *, faulty: bool) -> None:
    """A net of digits; from step 120 on the gradient of its first layer is a thousand times too large."""
    model = mlp(64, 48, 32, 10)

    def tamper(step: int) -> None:
        gradient = model.get_parameter("0.weight").grad
        if faulty and step >= 120 and gradient is not None:
            gradient.mul_(1000)

    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        batch_loss(model, digits(), F.cross_entropy),
        tamper=tamper,
    )


def one_gain(run: Run, *, faulty: bool) -> None:
    """A transformer; at step 265 the gain of the last layer norm becomes 1,000."""
    model = Gpt(12, 12)

    def begin(step: int) -> None:
        if faulty and step == 265:
            model.get_parameter("last.weight").data.fill_(1000.0)

    fit(
        run,
        model,
        torch.optim.AdamW(model.parameters(), 3e-3),
        batch_loss(model, markov(1000, 12, 12), letters_loss),
        begin=begin,
    )


_EXPLOSIVE = ("exploding", "spike", "diverging", "nonfinite")
PROGRAMS: tuple[Program, ...] = tuple(
    Program(
        name,
        "injected",
        partial(train, faulty=True),
        partial(train, faulty=False),
        why,
        300,
        onset,
        _EXPLOSIVE,
        suspect,
    )
    for name, train, why, onset, suspect in (
        ("one layer's weights times 30", inflated, "Left alone, it trains.", 100, "2."),
        ("one unit's weights become 100", one_unit, "Left alone, it trains.", 265, "blocks.0.down"),
        (
            "bit flip in a table",
            flipped_embedding,
            "One element becomes about 1e38; left alone, it trains.",
            150,
            "item.",
        ),
        ("one layer's momentum times a million", momentum, "Left alone, it trains.", 150, "4."),
        ("one layer's first moment times ten thousand", first_moment, "Left alone, it trains.", 150, "3."),
        ("one table's rate times a thousand", one_rate, "The common rate repairs it.", 100, "item."),
        ("one layer's gradient times a thousand", one_gradient, "The true gradient repairs it.", 120, "0."),
        ("one layer norm's gain of 1,000", one_gain, "Left alone, it trains.", 265, "last."),
    )
)
