"""The time that a run log adds to a step, and its size."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks.overhead.bench import Bench, Watched
from gradwatch.records import Facts, Provenance, Row, Scalars
from gradwatch.runlog.batch import Batch
from gradwatch.runlog.recording import Recording
from gradwatch.runlog.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_WIDTH = 160


class Deep(nn.Module):
    """75 linear layers, 150 tensors, with a way around each so that gradients reach all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(75))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, width)."""
        for layer in self.layers:
            x = x + torch.relu(layer(x)) / 75
        return x


def network() -> tuple[nn.Module, object]:
    """Return the model and its loss."""
    model, x = Deep(), torch.randn(40, _WIDTH)
    return model, lambda: model(x).square().mean()


def overhead(rounds: int, block: int) -> tuple[list[float], list[float], float]:
    """Return ratios of blocks with a log to blocks without that stand side by side, the noise, and the step in ms.

    One model under one monitor, whose log is taken away and put back.
    """
    bench = Bench(network, fused=False)
    watched = Watched(bench, clip="norm", log=True)
    desk = watched.monitor._pipeline.desk
    recording = desk.log
    assert isinstance(recording, Recording)
    times: dict[str, list[float]] = {"without": [], "again": [], "log": []}
    with watched.switched_on():
        for _ in range(rounds):
            for name in random.sample(list(times), 3):
                desk.log = recording if name == "log" else None
                desk._reports = [recording] if name == "log" else []
                recording._taken = watched.monitor.history.rows
                bench.steps(5)
                times[name].append(bench.steps(block))
    desk.log, desk._reports = recording, [recording]
    watched.on()
    watched.monitor.detach()
    ratios, noise = (
        [one / without for one, without in zip(times[name], times["without"], strict=True)] for name in ("log", "again")
    )
    return ratios, noise, 1e3 * statistics.median(times["without"])


def own(steps: int) -> tuple[float, float]:
    """Return the log's own microseconds for a step: in the training's thread, and those of the thread that writes."""
    bench = Bench(network, fused=False)
    watched = Watched(bench, clip="norm", log=True)
    pipeline = watched.monitor._pipeline
    recording = pipeline.desk.log
    assert isinstance(recording, Recording)
    spent = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: object) -> Any:
            nonlocal spent
            started = time.thread_time()
            result = call(*arguments)
            spent += time.thread_time() - started
            return result

        return timing

    for part, name in ((recording, "row"), (recording, "judged"), (recording, "step"), (pipeline.desk, "_snapshot")):
        setattr(part, name, timed(getattr(part, name)))  # no other report is there to ask for a snapshot
    clock = time.pthread_getcpuclockid(recording._writer._thread.ident or 0)
    with watched.switched_on():
        bench.steps(3)
        spent, before = 0.0, time.clock_gettime(clock)
        bench.steps(steps)
        mine, writers = spent, time.clock_gettime(clock) - before
    watched.on()
    watched.monitor.detach()
    return 1e6 * mine / steps, 1e6 * writers / steps


def size(folder: Path, layers: int, rows: int) -> float:
    """Write a log as a quiet training would, as fast as the disk allows; return the seconds it took."""
    columns = [(f"blocks.{n}.attention.weight", 65_536, 1, 256) for n in range(layers)]
    store = Store(folder, columns, {"rules": []}, Facts())
    drawn = np.random.default_rng(0)
    seen = Provenance("written", loss="written")
    started = time.perf_counter()
    for start in range(0, rows, 32):
        norms = np.exp(drawn.standard_normal((32, layers)))
        sampled = Row(start + 31, 1.0, norms[-1], 1.0, weight_norm=norms[-1], provenance=seen)
        batch = Batch(
            time=time.time(),
            scalars=Scalars(
                step=np.arange(start, start + 32),
                loss=drawn.random(32),
                global_norm=drawn.random(32),
                clip_coefficient=np.ones(32),
                skipped=np.zeros(32, dtype=bool),
                learning_rate=np.full(32, 0.1),
                loss_scale=np.full(32, np.nan),
            ),
            gradient=norms.astype(np.float32),
            special=[(31, sampled)],
        )
        store.write([batch])
    store.close(ended=True)
    return time.perf_counter() - started
