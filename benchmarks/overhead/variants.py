"""What watching costs: ``python -m benchmarks.overhead``.

One process, one model, one optimizer; each variant is switched on and off block by block, in random order beside plain
steps, plain steps again (the noise) and steps with `clip_grad_norm_`. Ratios are those of blocks that stand side by side;
shown are their medians and quartiles. One thread, and the process's own clock, which other load does not move; on a CUDA
device the wall clock, with the device awaited at the end of each block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gradwatch
from benchmarks.overhead.bench import Bench, Watched
from benchmarks.overhead.others import MISSING, OTHERS
from benchmarks.overhead.parts import Parts
from benchmarks.overhead.workloads import WORKLOADS

OWN: dict[str, dict[str, Any]] = {
    "watching": {},
    "armed": {"clip": "norm"},
    "clipping each step": {"clip": gradwatch.AutoClip(gradwatch.ClipNorm(1e-6), when="always")},
    "live report": {"clip": "norm", "report": "drawn into nothing"},
    "run log": {"clip": "norm", "log": "in a folder of its own"},
    "budget 1 %": {"budget": 0.01},
    "every=8": {"every": 8},
    "user clips too": {},
}
CACHED = Path("build") / "overhead.json"  # a later run of some variants replaces theirs


def compare(bench: Bench, name: str, rounds: int, block: int) -> dict[str, Any]:
    """Run one variant beside its controls; return ratios and times."""
    watched = Watched(bench, **OWN[name]) if name in OWN else None
    bench.steps(3)
    times: dict[str, list[float]] = {"plain": [], "again": [], "clip": [], "variant": []}
    own, clips = [], []
    for _ in range(rounds):
        for which in random.sample(list(times), 4):
            switch: AbstractContextManager[None] = nullcontext()
            if which == "variant":
                switch = watched.switched_on() if watched is not None else OTHERS[name](bench)
            with switch:
                if which == "clip" or (which == "variant" and name == "user clips too"):
                    bench.before_step = bench.clip
                bench.clip_seconds = 0.0
                spent = watched.probe.seconds if watched is not None else 0.0
                times[which].append(bench.steps(block))
                bench.before_step = None if which == "clip" or watched is not None else bench.before_step
            if which == "variant" and watched is not None:
                own.append((watched.probe.seconds - spent) / block)
            if which == "clip":
                clips.append(bench.clip_seconds / block)
    if watched is not None:
        watched.on()
        watched.monitor.detach()
    pairs = list(zip(times["variant"], times["plain"], times["clip"], times["again"], strict=True))
    return {
        "to plain": [variant / plain for variant, plain, _, _ in pairs],
        "to clip": [variant / clip for variant, _, clip, _ in pairs],
        "noise": [again / plain for _, plain, _, again in pairs],
        "clip to plain": [clip / plain for _, plain, clip, _ in pairs],
        "plain": statistics.median(times["plain"]),
        "own": statistics.median(own) if own else None,
        "clip own": statistics.median(clips),
    }


def parts_of(bench: Bench, count: int) -> dict[str, float]:
    """Return gradwatch's own microseconds for a step, armed, by part: see `Parts`."""
    watched = Watched(bench, clip="norm")
    with watched.switched_on(), Parts(watched.probe) as parts:
        bench.steps(count)
    watched.on()
    watched.monitor.detach()
    return {name: 1e6 * seconds / count for name, seconds in parts.seconds.items()}


def memory_of(bench: Bench, count: int) -> tuple[float, float]:
    """Return memory blocks that a step leaves behind, and kilobytes by which the process grows in 1,000 steps."""
    watched = Watched(bench, clip="norm")
    with watched.switched_on():
        bench.steps(1100)  # the ring is full, every page of it has been touched
        blocks, size = -sys.getallocatedblocks(), -_resident()
        bench.steps(count)
        blocks, size = blocks + sys.getallocatedblocks(), size + _resident()
    watched.on()
    watched.monitor.detach()
    return blocks / count, size / count


def device_counts(bench: Bench, count: int = 20) -> dict[str, float]:
    """Return, for a step on a CUDA device, how often watching waits for it and how many kernels it launches, armed."""
    watched = Watched(bench, clip="norm")
    found = {}
    for name, switch in (("plain", nullcontext()), ("armed", watched.switched_on())):
        with switch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(count):  # without the wait at the end of a block
                    bench.optimizer.zero_grad()
                    bench.loss().backward()
                    bench.optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(warning.message) for warning in told)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                bench.steps(count)
        kernels = sum(event.device_type.name == "CUDA" for event in profile.events() or [])
        found[name] = waits / count, kernels / count
    watched.on()
    watched.monitor.detach()
    return {
        "device waits a step": found["armed"][0] - found["plain"][0],
        "kernels a step": found["armed"][1] - found["plain"][1],
    }


def _resident() -> float:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shown(values: list[float]) -> str:
    """Return the median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def run(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Run what was asked for and print a table for each workload; return medians."""
    found: dict[str, dict[str, Any]] = {}
    for letter in options.workloads:
        workload = WORKLOADS[letter]
        table = Table(title=f"({letter}) {workload.title}", title_justify="left")
        for column in ("variant", "step / plain", "step / step with clip", "noise", "own us", "own / clip's own"):
            table.add_column(column)
        here: dict[str, Any] = {}
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for name in progress.track(options.variants.split(","), description=f"({letter})"):
                bench = Bench(workload.make, fused=options.fused)
                bench.steps(2)
                block = max(2, round(options.seconds / bench.steps(3)))
                try:
                    last = compare(bench, name, options.rounds, block)
                except Exception as error:  # another's fault must not end the run
                    if name in OWN:
                        raise
                    table.add_row(name, f"failed: {type(error).__name__}: {str(error)[:50]}")
                    continue
                own, clip = last["own"], last["clip own"]
                table.add_row(
                    name,
                    shown(last["to plain"]),
                    shown(last["to clip"]),
                    shown(last["noise"]),
                    "" if own is None else f"{1e6 * own:.0f}",
                    "" if own is None else f"{own / clip:.2f}",
                )
                here[name] = {
                    "to plain": statistics.median(last["to plain"]),
                    "to clip": statistics.median(last["to clip"]),
                    "own": None if own is None else 1e6 * own,
                    "own to clip": None if own is None else own / clip,
                }
                here["plain"], here["clip"] = 1e3 * last["plain"], statistics.median(last["clip to plain"])
            bench = Bench(workload.make, fused=options.fused)
            split = parts_of(bench, 320 if letter in "ab" else 64)
        here["parts"] = split
        table.caption = (
            f"plain step {here['plain']:.3g} ms, with clip_grad_norm_ {here['clip']:.3f} of it; armed, in us: "
            + ", ".join(f"{name} {value:.0f}" for name, value in split.items())
        )
        if options.device == "cuda":
            here["device"] = device_counts(Bench(workload.make, fused=options.fused))
            table.caption += "; " + ", ".join(f"{name} {value:g}" for name, value in here["device"].items())
        if letter == "a":
            here["blocks"], here["growth"] = memory_of(Bench(workload.make, fused=options.fused), 5000)
            table.caption += (
                f"; a step leaves {here['blocks']:.2f} memory blocks behind, 1,000 steps {here['growth']:.1f} KB"
            )
        console.print(table)
        found[letter] = here
    return found


def main() -> None:
    """Run and print."""
    names = [*OWN, *OTHERS]
    parser = argparse.ArgumentParser(description="What watching costs, beside clip_grad_norm_ and others.")
    parser.add_argument("--workloads", default="abcdef", help="which of a to f")
    parser.add_argument("--variants", default=",".join(names), help="which of: " + ", ".join(names).replace("%", "%%"))
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    parser.add_argument("--device", default="cpu", help="where the models live: cpu or cuda")
    parser.add_argument("--scaling", action="store_true", help="cost by layers, parameters and steps done, instead")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.device}, one thread of "
        f"{os.cpu_count()} cores, AdamW {'fused' if options.fused else 'foreach'}, {options.rounds} rounds"
    )
    console.print(f"{title}; median (quartiles)")
    if MISSING:
        console.print("not installed: " + ", ".join(MISSING) + "; pip install -e '.[bench]'")
    if options.scaling:
        from benchmarks.overhead import scaling

        scaling.main(console, write=options.write)
        return
    found = json.loads(CACHED.read_text()) if CACHED.exists() else {}
    for letter, here in run(options, console).items():
        found[letter] = {**found.get(letter, {}), **here}
    CACHED.parent.mkdir(exist_ok=True)
    CACHED.write_text(json.dumps(found, indent=1))
    if options.write:
        from benchmarks.pages import write_overhead

        write_overhead(dict(sorted(found.items())), title)


if __name__ == "__main__":
    main()
