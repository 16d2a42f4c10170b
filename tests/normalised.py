"""A training with batch normalisation in two processes on gloo, for `tests.test_checkpoints`.

Run by torchrun as ``python -m tests.normalised WHAT FOLDER``: ``skip`` has a batch with NaN in the last process, ``guard`` a
running mean that is not finite there at the end.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import device
from tests.trainings import data

BAD = 7


def main() -> None:
    """Train and leave what was seen."""
    torch.set_num_threads(1)
    if os.environ.get("AS_ON_A_DEVICE"):
        device.reading_is_free = lambda _: False  # type: ignore[assignment]
    what, folder = sys.argv[1:3]
    dist.init_process_group("gloo")
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
    seen = {
        "skipped": monitor.history.skipped().nonzero()[0].tolist(),
        "finite": [bool(buffer.isfinite().all()) for buffer in inner.buffers()],
        "counter": int(inner.get_buffer("1.num_batches_tracked")),
        "guards": guards,
        "notes": monitor.notes,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in tests.processes


if __name__ == "__main__":
    main()
