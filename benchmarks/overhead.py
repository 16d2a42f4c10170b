"""What watching costs: ``python -m benchmarks.overhead``.

One process, one model, one optimizer; each variant is switched on and off block by block, in random order beside plain
steps, plain steps again (the noise) and steps with `clip_grad_norm_`. Ratios are those of blocks that stand side by side;
shown are their medians and quartiles. One thread, and the process's own clock, which other load does not move.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import gradwatch
from benchmarks.workloads import WORKLOADS
from gradwatch import hooks, taps

WARM = 70  # steps after which each variant is in its steady state
Variant = Callable[["Bench"], AbstractContextManager[None]]


class Bench:
    """One model under one variant, with controls beside it."""

    def __init__(self, make: Callable[[], Any], *, fused: bool) -> None:
        torch.manual_seed(0)
        self.model, self.loss = make()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.before_step: Callable[[], Any] | None = None
        self.clip_seconds = 0.0

    def steps(self, count: int) -> float:
        """Train; return the seconds of the process for one step."""
        started = time.process_time()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            if self.before_step is not None:
                self.before_step()
            self.optimizer.step()
        return (time.process_time() - started) / count

    def clip(self) -> None:
        """What users do today, at a bound that clips nothing."""
        started = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 1e9)
        self.clip_seconds += time.perf_counter() - started


class Watched:
    """A monitor that can be switched off and on without losing what it has learned."""

    def __init__(self, bench: Bench, **settings: Any) -> None:
        self.monitor = gradwatch.attach(bench.model, report=None, strict=True, **settings)
        bench.steps(WARM)
        self.probe = self.monitor._probe
        self.off()

    def off(self) -> None:
        """Take every hook and tap away."""
        hooks.unlisten(self.probe)
        for tap in taps.ALL:
            tap.remove(self.probe)
        arrivals = self.probe.arrivals
        self.marker = [(column, arrivals._layers.parameter(column)) for column in arrivals._hooks]
        arrivals.stop()

    def on(self) -> None:
        """Put them back."""
        hooks.listen(self.probe)
        for tap in taps.ALL:
            tap.add(self.probe)
        for column, parameter in self.marker:
            if parameter is not None:
                self.probe.arrivals._hooks[column] = self.probe.arrivals._hook(column, parameter)


def naive(bench: Bench) -> Callable[[], None]:
    """The loop that people write: one norm read for each parameter."""

    def record() -> None:
        [parameter.grad.norm().item() for parameter in bench.parameters if parameter.grad is not None]

    return record


def compare(bench: Bench, name: str, rounds: int, block: int) -> dict[str, Any]:
    """Run one variant beside its controls; return ratios and times."""
    watched: Watched | None = None
    context: AbstractContextManager[Any] = nullcontext()
    before: Callable[[], None] | None = None
    if name == "watching":
        watched = Watched(bench)
    elif name == "armed":
        watched = Watched(bench, clip="norm")
    elif name == "clipping each step":
        watched = Watched(bench, clip=gradwatch.AutoClip(gradwatch.ClipNorm(1e-6), when="always"))
    elif name == "every=8":
        watched = Watched(bench, every=8)
    elif name == "item loop":
        before = naive(bench)
    elif name == "detect_anomaly":
        warnings.filterwarnings("ignore", "Anomaly Detection")
        context = torch.autograd.detect_anomaly(check_nan=True)
    bench.steps(3)
    times: dict[str, list[float]] = {"plain": [], "again": [], "clip": [], "variant": []}
    own, clips = [], []
    for _ in range(rounds):
        for which in random.sample(list(times), 4):
            bench.before_step = {"clip": bench.clip, "variant": before}.get(which)
            bench.clip_seconds = 0.0
            if which == "variant" and watched is not None:
                watched.on()
                spent = watched.probe.seconds
            with context if which == "variant" else nullcontext():
                times[which].append(bench.steps(block))
            if which == "variant" and watched is not None:
                own.append((watched.probe.seconds - spent) / block)
                watched.off()
            if which == "clip":
                clips.append(bench.clip_seconds / block)
    bench.before_step = None
    if watched is not None:
        watched.on()
        watched.monitor.detach()
    pairs = {
        "to plain": [v / p for v, p in zip(times["variant"], times["plain"], strict=True)],
        "to clip": [v / c for v, c in zip(times["variant"], times["clip"], strict=True)],
        "noise": [a / p for a, p in zip(times["again"], times["plain"], strict=True)],
        "clip to plain": [c / p for c, p in zip(times["clip"], times["plain"], strict=True)],
    }
    return {
        **pairs,
        "plain": statistics.median(times["plain"]),
        "own": statistics.median(own) if own else None,
        "clip own": statistics.median(clips),
    }


def blocks_kept(bench: Bench) -> float:
    """Return how many of Python's memory blocks a quiet step leaves behind, over 320 steps."""
    watched = Watched(bench)
    watched.on()
    bench.steps(16)
    before = sys.getallocatedblocks()
    bench.steps(320)
    kept = (sys.getallocatedblocks() - before) / 320
    watched.monitor.detach()
    return kept


def shown(values: list[float]) -> str:
    """Return the median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


VARIANTS = ("watching", "armed", "clipping each step", "every=8", "item loop", "detect_anomaly")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="What watching costs, beside clip_grad_norm_ and others.")
    parser.add_argument("--workloads", default="abcdef", help="which of a to f")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of: " + ", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each kind")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {os.cpu_count()} cores, "
        f"AdamW {'fused' if options.fused else 'foreach'}, {options.rounds} rounds; median (quartiles)"
    )
    for letter in options.workloads:
        workload = WORKLOADS[letter]
        table = Table(title=f"({letter}) {workload.title}", title_justify="left")
        for column in ("variant", "step / plain", "step / step with clip", "noise", "own us", "own / clip's own"):
            table.add_column(column)
        for name in options.variants.split(","):
            bench = Bench(workload.make, fused=options.fused)
            bench.steps(2)
            block = max(2, round(options.seconds / bench.steps(3)))
            found = compare(bench, name, options.rounds, block)
            own = found["own"]
            table.add_row(
                name,
                shown(found["to plain"]),
                shown(found["to clip"]),
                shown(found["noise"]),
                "" if own is None else f"{1e6 * own:.0f}",
                "" if own is None else f"{own / found['clip own']:.2f}",
            )
            last = found
        table.caption = (
            f"plain step {1e3 * last['plain']:.3g} ms; clip_grad_norm_ {1e6 * last['clip own']:.0f} us, "
            f"step {shown(last['clip to plain'])} of plain"
        )
        if letter in "ab":  # the others take minutes for 320 steps
            kept = blocks_kept(Bench(workload.make, fused=options.fused))
            table.caption += f"; a quiet step leaves {kept:.2f} blocks of memory"
        console.print(table)


if __name__ == "__main__":
    main()
