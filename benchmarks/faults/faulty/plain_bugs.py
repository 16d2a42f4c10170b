"""Plain bugs of a training script: what was forgotten, doubled, detached or turned round."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from benchmarks.faults.data import digits, markov, patterns, ratings, teacher
from benchmarks.faults.loops import batch_loss, fit, letters_loss
from benchmarks.faults.models import Letters, Recommender, convnet, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def no_zero_grad(run: Run, *, faulty: bool) -> None:
    """Gradients are never cleared and add up."""
    x, y = teacher(1000, 10)
    model = mlp(10, 48, 48, 1, act=nn.LeakyReLU)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    run.watch(model)
    while True:
        if not faulty:
            optimizer.zero_grad()
        rows = torch.randint(len(x), (32,))
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        run.step(loss)


def summed_loss(run: Run, *, faulty: bool) -> None:
    """The loss is summed over the batch while the rate is the one for a mean."""
    task = patterns(1000)
    model = convnet(6)
    objective = partial(F.cross_entropy, reduction="sum" if faulty else "mean")
    fit(run, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), batch_loss(model, task, objective, 64))


class _Cut(nn.Module):
    """An encoder and a decoder, with or without a path for the gradient between them."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 32, 6, act=nn.Tanh), mlp(6, 32, 64, act=nn.Tanh)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        pixels: Tensor = self.decoder(code.detach() if self.cut else code)
        return pixels


def detached_encoder(run: Run, *, faulty: bool) -> None:
    """An autoencoder of digits whose code is detached."""
    x, _ = digits()
    model = _Cut(cut=faulty)
    fit(run, model, torch.optim.Adam(model.parameters(), 5e-3), batch_loss(model, (x, x)))


def wrong_sign(run: Run, *, faulty: bool) -> None:
    """The loss has the wrong sign and is made larger."""
    model = Recommender(40, 40)

    def objective(rating: Tensor, y: Tensor) -> Tensor:
        return -F.mse_loss(rating, y) if faulty else F.mse_loss(rating, y)

    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    fit(run, model, optimizer, batch_loss(model, ratings(3000, 40, 40), objective, 128))


def stale_copy(run: Run, *, faulty: bool) -> None:
    """The optimizer has the weights of the model before it was copied."""
    x, y = markov(1000, 12, 12)
    model = Letters(12)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if faulty:
        model = copy.deepcopy(model)
    run.watch(model)
    while True:
        model.zero_grad()
        rows = torch.randint(len(x), (32,))
        loss = letters_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        run.step(loss)


def schedule_ends_early(run: Run, *, faulty: bool) -> None:
    """A cosine schedule that was given epochs and is stepped each batch: the rate is zero from step 10."""
    task = patterns(1000)
    model = convnet(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    length = 10 if faulty else run.steps

    def begin(step: int) -> None:
        share = torch.tensor(min(1.0, step / length) * torch.pi)
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * float(1 + torch.cos(share))

    fit(run, model, optimizer, batch_loss(model, task, F.cross_entropy), begin=begin)


def double_softmax(run: Run, *, faulty: bool) -> None:
    """The net ends in a softmax and the loss takes another."""
    model = mlp(64, 48, 32, 10)
    if faulty:
        model.append(nn.Softmax(1))
    fit(run, model, torch.optim.SGD(model.parameters(), 0.2), batch_loss(model, digits(), F.cross_entropy))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "zero_grad forgotten",
        "plain bugs",
        partial(no_zero_grad, faulty=True),
        partial(no_zero_grad, faulty=False),
        "Gradients add up over all steps; clearing them repairs it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "loss summed at the rate of a mean",
        "plain bugs",
        partial(summed_loss, faulty=True),
        partial(summed_loss, faulty=False),
        "The summed loss makes the step 64 times too long; the mean repairs it.",
        symptoms=("exploding", "diverging", "dead"),
    ),
    Program(
        "encoder detached",
        "plain bugs",
        partial(detached_encoder, faulty=True),
        partial(detached_encoder, faulty=False),
        "The code is detached, so that the encoder gets no gradient; leaving it attached repairs it.",
        symptoms=("frozen",),
        suspect="encoder.",
    ),
    Program(
        "loss of the wrong sign",
        "plain bugs",
        partial(wrong_sign, faulty=True),
        partial(wrong_sign, faulty=False),
        "The error is made larger instead of smaller; the right sign repairs it.",
        symptoms=("exploding", "diverging"),
    ),
    Program(
        "optimizer of a stale copy",
        "plain bugs",
        partial(stale_copy, faulty=True),
        partial(stale_copy, faulty=False),
        "The model was copied after the optimizer was built, so that it never changes; building it after the copy repairs it.",
        symptoms=("frozen", "stalled"),
    ),
    Program(
        "schedule counted in epochs",
        "plain bugs",
        partial(schedule_ends_early, faulty=True),
        partial(schedule_ends_early, faulty=False),
        "The rate is zero from step 10; a schedule as long as the run repairs it.",
        onset=10,
        symptoms=("frozen", "stalled"),
    ),
    Program(
        "softmax twice",
        "plain bugs",
        partial(double_softmax, faulty=True),
        partial(double_softmax, faulty=False),
        "The loss takes the softmax of a softmax and can hardly fall; taking out the first repairs it.",
        symptoms=("stalled",),
    ),
)
