"""A training with batch normalisation in two processes on gloo, for `tests.test_checkpoints`.

Run as ``python -m tests.torchrun 2 tests.normalised FOLDER``: ``skip`` has a batch with NaN in the last process, ``guard`` a
running mean that is not finite there at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import device
from tests.trainings import data

BAD = 7
_FREE = device.reading_is_free


def train(what: str, *, later: bool) -> dict[str, Any]:
    """Train, ``later`` by the path for devices; return what was seen."""
    device.reading_is_free = (lambda _: False) if later else _FREE  # type: ignore[assignment]
    rank = dist.get_rank()
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    model = DistributedDataParallel(inner, broadcast_buffers=what == "skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    monitor = gradwatch.attach(model, clip="norm" if what == "skip" else None, report=None, strict=True)
    x, y = data()
    guards = []
    for step in range(24):
        bad = step == BAD and rank == 1 and what == "skip"
        if step == 8 and rank == 1 and what == "guard":
            inner.get_buffer("1.running_mean")[0] = math.nan
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rank::2] * (math.nan if bad else 1)), y[rank::2]).backward()
        optimizer.step()
        guards.append(monitor.checkpoint_guard().reason)
    monitor.detach()
    return {
        "skipped": monitor.history.skipped().nonzero()[0].tolist(),
        "finite": [bool(buffer.isfinite().all()) for buffer in inner.buffers()],
        "counter": int(inner.get_buffer("1.num_batches_tracked")),
        "guards": guards,
        "notes": monitor.notes,
    }


def see() -> list[dict[str, Any]]:
    """Make all four trainings."""
    return [train(what, later=later) for what in ("skip", "guard") for later in (False, True)]
