"""Faults of the optimizer's state and settings: moments lost or scaled, and wrong weight decay."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from benchmarks.faults.data import digits, markov, patterns, teacher
from benchmarks.faults.loops import batch_loss, fit, letters_loss
from benchmarks.faults.models import Letters, convnet, mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def second_moment_lost(run: Run, *, faulty: bool) -> None:
    """A resumed LSTM: Adam's first moment and step count came back, its second moment is zero."""
    model = Letters(12)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2, betas=(0.9, 0.999))

    def begin(step: int) -> None:
        if faulty and step == 150:
            for state in optimizer.state.values():
                state["exp_avg_sq"].zero_()

    fit(run, model, optimizer, batch_loss(model, markov(1000, 12, 12, sharp=20.0), letters_loss), begin=begin)


def momentum_scaled(run: Run, *, faulty: bool) -> None:
    """A conv net whose momentum buffers come back multiplied by a loss scale."""
    task = patterns(1000)
    model = convnet(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)

    def begin(step: int) -> None:
        if faulty and step == 150:
            for state in optimizer.state.values():
                state["momentum_buffer"].mul_(1024)

    fit(run, model, optimizer, batch_loss(model, task, F.cross_entropy), begin=begin)


def heavy_decay(run: Run, *, faulty: bool) -> None:
    """AdamW whose weight decay is 10."""
    x, y = digits()
    model = mlp(64, 48, 48, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=10.0 if faulty else 0.01)
    fit(run, model, optimizer, batch_loss(model, (x, y), F.cross_entropy))


def negative_decay(run: Run, *, faulty: bool) -> None:
    """A weight decay of the wrong sign, set in the parameter groups."""
    task = teacher(1000, 10)
    model = mlp(10, 48, 48, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.param_groups[0]["weight_decay"] = -3.0 if faulty else 0.03  # the constructor would refuse it
    fit(run, model, optimizer, batch_loss(model, task))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "second moment lost at step 150",
        "optimizer state",
        partial(second_moment_lost, faulty=True),
        partial(second_moment_lost, faulty=False),
        "Adam's second moment is zeroed while the step count is kept, so that updates are huge; keeping it repairs it.",
        onset=150,
        symptoms=("spike", "exploding", "diverging"),
    ),
    Program(
        "momentum times 1024 at step 150",
        "optimizer state",
        partial(momentum_scaled, faulty=True),
        partial(momentum_scaled, faulty=False),
        "The momentum buffers are multiplied by a loss scale; loading them as they are repairs it.",
        onset=150,
        symptoms=("spike", "exploding", "diverging", "dead"),
    ),
    Program(
        "weight decay of 10",
        "optimizer state",
        partial(heavy_decay, faulty=True),
        partial(heavy_decay, faulty=False),
        "The decay takes the weights to zero faster than they learn; 0.01 repairs it.",
        symptoms=("stalled",),
    ),
    Program(
        "weight decay of the wrong sign",
        "optimizer state",
        partial(negative_decay, faulty=True),
        partial(negative_decay, faulty=False),
        "The weights grow by a share each step; the right sign repairs it.",
        symptoms=("exploding", "diverging"),
    ),
)
