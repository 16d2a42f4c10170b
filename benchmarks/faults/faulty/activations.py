"""Faults of activations: saturated, dead, forgotten, or an output that explodes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.data import clusters, digit_images, standard, teacher, words
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import Bag, conv, mlp, weights
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Run


def deep(run: Run, *, act: Callable[[], nn.Module]) -> None:
    """Plain SGD on a network of eight layers with Kaiming's weights that tells clouds of points apart."""
    model = mlp(8, 24, 24, 24, 24, 24, 24, 24, 5, act=act)
    for weight in weights(model):
        nn.init.kaiming_normal_(weight)
    fit(
        run,
        model,
        torch.optim.SGD(model.parameters(), 0.03),
        batch_loss(model, clusters(), nn.functional.cross_entropy),
    )


def dead(run: Run, *, bias: float) -> None:
    """RMSprop on a conv net for digits whose first layer's bias starts at a value."""
    model = conv()
    layer = model[0]
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    fit(
        run,
        model,
        torch.optim.RMSprop(model.parameters(), 0.002),
        batch_loss(model, digit_images(), nn.functional.cross_entropy),
    )


def positive(run: Run, *, link: Callable[[Tensor], Tensor]) -> None:
    """SGD with momentum on a bag of embeddings that predicts positive numbers through a link function."""
    model = Bag()
    x, y = words()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    fit(
        run,
        model,
        optimizer,
        batch_loss(model, (x, 5 + 2 * y), lambda raw, wanted: nn.functional.mse_loss(link(raw), wanted)),
    )


def chain(run: Run, *, act: Callable[[], nn.Module]) -> None:
    """SGD with momentum on ten layers with Kaiming's weights for ReLU, two targets."""
    model = mlp(8, *[32] * 9, 2, act=act)
    for weight in weights(model):
        nn.init.kaiming_normal_(weight)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.005, momentum=0.9), batch_loss(model, teacher(outputs=2)))


def saturated(run: Run, *, scaled: bool) -> None:
    """AdamW on a tanh network whose features are in the thousands, or standardised."""
    x, y = teacher(inputs=6, outputs=3)
    raw = 2000 + 1000 * x
    model = mlp(6, 32, 32, 3, act=nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fit(run, model, optimizer, batch_loss(model, (standard(raw) if scaled else raw, y)))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "eight sigmoid layers",
        "activations",
        partial(deep, act=nn.Sigmoid),
        partial(deep, act=nn.ReLU),
        "Each sigmoid passes a quarter of the gradient at most, so the first of eight layers get none; ReLU repairs it.",
        symptoms=("vanishing", "stalled"),
    ),
    Program(
        "first convolution dead by its bias",
        "activations",
        partial(dead, bias=-10.0),
        partial(dead, bias=0.0),
        "A bias of -10 keeps every ReLU of the first convolution at zero, so it gets no gradient; a bias of 0 repairs it.",
        symptoms=("dead", "frozen", "stalled"),
        suspect="0",
    ),
    Program(
        "exponential as output activation",
        "activations",
        partial(positive, link=torch.exp),
        partial(positive, link=nn.functional.softplus),
        "The exponential turns one overshoot into a huge prediction and gradient; softplus is as positive and grows linearly.",
        symptoms=("exploding", "spike", "vanishing", "stalled"),
    ),
    Program(
        "ten linear layers without activations",
        "activations",
        partial(chain, act=nn.Identity),
        partial(chain, act=nn.ReLU),
        "Kaiming's weights double the variance for a ReLU that was forgotten, so ten layers make it 1000; the ReLUs repair it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "tanh saturated by raw features",
        "activations",
        partial(saturated, scaled=False),
        partial(saturated, scaled=True),
        "Features in the thousands saturate the first tanh, which then passes no gradient; standardising them repairs it.",
        symptoms=("vanishing", "dead", "spike", "stalled"),  # a saturated unit's gradient is exactly zero: it is dead
        suspect="0",
    ),
)
