"""Faults put into one known layer at a known step: gradients, weights and optimizer state."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from benchmarks.faults.attention import Gpt
from benchmarks.faults.data import digits, markov, patterns, ratings, teacher
from benchmarks.faults.loops import batch_loss, fit, letters_loss
from benchmarks.faults.models import Letters, Recommender, convnet, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def flip_bit(tensor: Tensor, place: int, bit: int = 30) -> None:
    """Flip one bit of one element; bit 30 multiplies a small number by 2 ** 128."""
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[place] = bits[place] ^ (1 << bit)


def growing_gradient(run: Run, *, faulty: bool) -> None:
    """A regression net; from step 120 the third layer's gradient is multiplied by a factor that grows a tenth a step."""
    task = teacher(1000, 10)
    model = mlp(10, 32, 32, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)

    def scale(gradient: Tensor) -> Tensor:
        return gradient * 1.1 ** max(0, run.made - 120)

    if faulty:
        for parameter in model[4].parameters():
            parameter.register_hook(scale)
    fit(run, model, optimizer, batch_loss(model, task))


def flipped_weight(run: Run, *, faulty: bool) -> None:
    """A conv net; at step 150 the highest exponent bit of one weight of the second convolution flips."""
    task = patterns(1000)
    model = convnet(6)
    weight = model.get_parameter("3.weight")

    def begin(step: int) -> None:
        if faulty and step == 150:
            flip_bit(weight, int(weight.detach().flatten().argmax()))

    fit(run, model, torch.optim.Adam(model.parameters(), 3e-3), batch_loss(model, task, F.cross_entropy), begin=begin)


def overwritten_rows(run: Run, *, faulty: bool) -> None:
    """A GRU; at step 150 a quarter of the rows of its output layer are overwritten by large values."""
    model = Letters(12, cell=nn.GRU)
    optimizer = torch.optim.RMSprop(model.parameters(), 3e-3)

    def begin(step: int) -> None:
        if faulty and step == 150:
            with torch.no_grad():
                model.head.weight[:3] = 100.0

    fit(run, model, optimizer, batch_loss(model, markov(1000, 12, 12), letters_loss), begin=begin)


def nan_gradient(run: Run, *, faulty: bool) -> None:
    """A transformer; at step 150 the gradient of the second block's feed-forward layer is NaN."""
    model = Gpt(12, 12)

    def tamper(step: int) -> None:
        gradient = model.get_parameter("blocks.1.up.weight").grad
        if faulty and step == 150 and gradient is not None:
            gradient.fill_(torch.nan)

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    fit(run, model, optimizer, batch_loss(model, markov(1000, 12, 12), letters_loss), tamper=tamper)


def zeroed_gradient(run: Run, *, faulty: bool) -> None:
    """A recommender whose table of users has a gradient of zero from step 10."""
    model = Recommender(40, 40)

    def tamper(step: int) -> None:
        gradient = model.user.weight.grad
        if faulty and step >= 10 and gradient is not None:
            gradient.zero_()

    optimizer = torch.optim.RMSprop(model.parameters(), 1e-2)
    fit(run, model, optimizer, batch_loss(model, ratings(3000, 40, 40), size=128), tamper=tamper)


def flipped_state(run: Run, *, faulty: bool) -> None:
    """A net of digits; at step 150 a bit flips in Adam's first moment of the second layer."""
    task = digits()
    model = mlp(64, 48, 32, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def begin(step: int) -> None:
        if faulty and step == 150:
            moment = optimizer.state[model.get_parameter("2.weight")]["exp_avg"]
            flip_bit(moment, int(moment.flatten().abs().argmax()))

    fit(run, model, optimizer, batch_loss(model, task, F.cross_entropy), begin=begin)


def dead_layer(run: Run, *, faulty: bool) -> None:
    """A ReLU net; at step 150 the biases of the second layer are overwritten so that all its units are silent."""
    task = digits()
    model = mlp(64, 48, 32, 10)

    def begin(step: int) -> None:
        if faulty and step == 150:
            with torch.no_grad():
                model.get_parameter("2.bias").fill_(-1000.0)

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    fit(run, model, optimizer, batch_loss(model, task, F.cross_entropy), begin=begin)


PROGRAMS: tuple[Program, ...] = (
    Program(
        "one layer's gradient grows from step 120",
        "injected",
        partial(growing_gradient, faulty=True),
        partial(growing_gradient, faulty=False),
        "A hook multiplies one layer's gradient by a growing factor; without the hook it trains.",
        onset=120,
        symptoms=("exploding", "spike", "diverging", "dead"),
        suspect="4.",
    ),
    Program(
        "bit flip in a convolution's weight",
        "injected",
        partial(flipped_weight, faulty=True),
        partial(flipped_weight, faulty=False),
        "One weight becomes about 1e37 at step 150; without the flip it trains.",
        onset=150,
        symptoms=("nonfinite", "exploding"),
        suspect="3.",
    ),
    Program(
        "rows of the output layer overwritten",
        "injected",
        partial(overwritten_rows, faulty=True),
        partial(overwritten_rows, faulty=False),
        "Three rows of the output's weight become 100 at step 150; leaving them alone repairs it.",
        onset=150,
        symptoms=("exploding", "spike", "diverging"),
        suspect="head.",
    ),
    Program(
        "one layer's gradient NaN at step 150",
        "injected",
        partial(nan_gradient, faulty=True),
        partial(nan_gradient, faulty=False),
        "One layer's gradient is NaN once; a finite one repairs it.",
        onset=150,
        symptoms=("nonfinite",),
        suspect="blocks.1.up",
    ),
    Program(
        "user table's gradient zero from step 10",
        "injected",
        partial(zeroed_gradient, faulty=True),
        partial(zeroed_gradient, faulty=False),
        "The users' embedding gets no gradient and stays as it was; its true gradient repairs it.",
        onset=10,
        symptoms=("frozen", "dead", "vanishing"),
        suspect="user.",
    ),
    Program(
        "bit flip in Adam's first moment",
        "injected",
        partial(flipped_state, faulty=True),
        partial(flipped_state, faulty=False),
        "One element of the first moment becomes about 1e36 at step 150; without the flip it trains.",
        onset=150,
        symptoms=("exploding", "spike", "diverging"),
        suspect="2.",
    ),
    Program(
        "one layer's units silenced at step 150",
        "injected",
        partial(dead_layer, faulty=True),
        partial(dead_layer, faulty=False),
        "Biases of -1000 silence all ReLU units of a layer; leaving the biases alone repairs it.",
        onset=150,
        symptoms=("dead", "vanishing", "stalled"),
        suspect="2.",
    ),
)
