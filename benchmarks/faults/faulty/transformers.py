"""Faults of transformers: attention that saturates, norms that are missing, first weights and rates that are too large."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.faults.attention import Gpt
from benchmarks.faults.data import markov, recall
from benchmarks.faults.loops import batch_loss, fit, letters_loss
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def unscaled_attention(run: Run, *, faulty: bool) -> None:
    """A copy task; queries and keys begin large and their product is not divided by the root of the width."""
    task = recall(2000, 12, 8)
    model = Gpt(8, 12, heads=1, blocks=1, scale=1.0 if faulty else None)
    if faulty:
        nn.init.normal_(model.get_parameter("blocks.0.qkv.weight")[:64], std=5.0)
    fit(run, model, torch.optim.AdamW(model.parameters(), 5e-3), batch_loss(model, task, letters_loss))


def post_norm(run: Run, *, faulty: bool) -> None:
    """A post-norm transformer by Adam at a high rate, with no warm-up."""
    task = markov(1000, 12, 12)
    model = Gpt(12, 12, norm="post")
    optimizer = torch.optim.Adam(model.parameters(), 0.1)

    def begin(step: int) -> None:
        if not faulty:
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 50)

    fit(run, model, optimizer, batch_loss(model, task, letters_loss), begin=begin)


def no_norm(run: Run, *, faulty: bool) -> None:
    """Transformer blocks without their layer norms, by SGD with momentum."""
    task = markov(1000, 12, 12)
    model = Gpt(12, 12, norm="none" if faulty else "pre", embed_std=3.0)
    fit(run, model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), batch_loss(model, task, letters_loss))


def large_embedding(run: Run, *, faulty: bool) -> None:
    """A copy task; the first embedding is so large that places and attention drown in the residual stream."""
    task = recall(2000, 12, 8)
    model = Gpt(8, 12, heads=1, blocks=1, embed_std=20.0 if faulty else 0.2)
    fit(run, model, torch.optim.AdamW(model.parameters(), 3e-3), batch_loss(model, task, letters_loss))


def high_rate(run: Run, *, faulty: bool) -> None:
    """Plain SGD with a rate of 10."""
    task = markov(1000, 12, 12)
    model = Gpt(12, 12, blocks=1)
    fit(run, model, torch.optim.SGD(model.parameters(), 10.0 if faulty else 0.3), batch_loss(model, task, letters_loss))


PROGRAMS: tuple[Program, ...] = (
    Program(
        "attention unscaled and large",
        "transformers",
        partial(unscaled_attention, faulty=True),
        partial(unscaled_attention, faulty=False),
        "Attention's softmax saturates; the root of the width and usual first weights repair it.",
        symptoms=("spike", "exploding", "stalled"),
        suspect="blocks.0.qkv",
    ),
    Program(
        "post-norm without warm-up",
        "transformers",
        partial(post_norm, faulty=True),
        partial(post_norm, faulty=False),
        "Adam at 0.1 from the first step ruins a post-norm transformer; a warm-up to 5e-3 repairs it.",
        symptoms=("stalled",),
    ),
    Program(
        "layer norms missing",
        "transformers",
        partial(no_norm, faulty=True),
        partial(no_norm, faulty=False),
        "Without norms the residual stream and the gradients grow; the norms repair it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "embedding begins large",
        "transformers",
        partial(large_embedding, faulty=True),
        partial(large_embedding, faulty=False),
        "The embedding's first weights have a spread of 20 and drown all else; 0.2 repairs it.",
        symptoms=("stalled",),
        suspect="embed.",
    ),
    Program(
        "transformer by SGD at a rate of 10",
        "transformers",
        partial(high_rate, faulty=True),
        partial(high_rate, faulty=False),
        "The rate is far too high; 0.3 repairs it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
)
