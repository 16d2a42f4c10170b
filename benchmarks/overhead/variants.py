"""One variant of watching beside its controls, and where its time and memory go."""

from __future__ import annotations

import os
import random
import statistics
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import gradwatch
from benchmarks.overhead.bench import Bench, Watched
from benchmarks.overhead.others import OTHERS
from benchmarks.overhead.parts import Parts

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
# what happens seldom needs longer blocks: a picture is drawn about twice a second
RARE = ("live report", "every=8", "budget 1 %")
LONGER = 8


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
