"""What finding the operation costs: keeping the inputs of each healthy step, and the step that failed.

One monitor watches one model; the hooks that keep inputs, outputs and the gradient of the output are taken away and put back
block by block, in random order, so that both kinds of steps are watched alike. The repetition of a step is timed by itself.
"""

from __future__ import annotations

import random
import statistics
from time import thread_time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.overhead.bench import Bench, shown
from benchmarks.overhead.workloads import WORKLOADS
from gradwatch.forensics.replay import Repeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.overhead.workloads import Workload


def healthy(bench: Bench, rounds: int, seconds: float) -> tuple[list[float], list[float], float]:
    """Return ratios of steps with to steps without what is kept, of the same without to without, and the seconds of a step."""
    monitor = gradwatch.attach(bench.model, report=None, forensics=True, strict=True)
    inspector = monitor._inspector
    assert inspector is not None
    step = bench.steps(70)
    block = max(2, round(seconds / step))
    ratios, noise = [], []
    for _ in range(rounds):
        times: dict[str, float] = {}
        for which in random.sample(["kept", "not", "again"], 3):
            if which == "kept":
                inspector._capture.start()
            else:
                inspector._capture.stop()
            times[which] = bench.steps(block)
        ratios.append(times["kept"] / times["not"])
        noise.append(times["again"] / times["not"])
    monitor.detach()
    return ratios, noise, step


def failed(bench: Bench) -> tuple[float, float, float]:
    """Return the seconds of a step, of repeating a forward, and a forward with its backward, each the smallest of five.

    They are seconds of this thread alone, which other work on the machine does not lengthen, and are measured in turn.
    """
    monitor = gradwatch.attach(bench.model, report=None, forensics=True, strict=True)
    inspector = monitor._inspector
    assert inspector is not None
    bench.steps(3)
    bench.loss().backward()
    call = inspector._capture.calls[-1]
    gradients = [one.grad if one.retains_grad else None for one in call.outputs]
    inspector._capture.pause(on=False)
    forward, both = Repeat(bench.model, call), Repeat(bench.model, call, gradients)
    monitor.detach()
    with torch.enable_grad():
        times = [[_seconds(run) for run in (lambda: bench.steps(1), forward.run, both.run)] for _ in range(5)]
    step, alone, whole = map(min, zip(*times, strict=True))
    return step, alone, whole


def _seconds(run: Callable[..., object], *args: int) -> float:
    started = thread_time()
    run(*args)
    return thread_time() - started


class Root(nn.Module):
    """Takes roots of elements of which many are zero, while it is on, so that a backward fails."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return torch.sqrt(x * (x > 0.1)) if self.on else x


def failing(workload: Workload) -> float | None:
    """Return how many plain steps a step takes whose backward fails in the middle of a model that is a sequence, else None."""
    model, _ = workload.make()
    if not isinstance(model, nn.Sequential):
        return None
    ratios = []
    for _ in range(5):
        root = Root()

        def make(root: Root = root) -> Any:
            model, loss = workload.make()
            assert isinstance(model, nn.Sequential)
            model.insert(len(model) // 2, root)
            return model, loss

        bench = Bench(make, fused=False)
        monitor = gradwatch.attach(bench.model, report=None, forensics=True, strict=True, clip="norm")
        bench.steps(6)
        plain = min(_seconds(bench.steps, 1) for _ in range(5))
        root.on = True
        ratios.append(_seconds(bench.steps, 1) / plain)
        assert any(one.origin is not None and one.origin.op == "sqrt" for one in monitor.incidents)
        monitor.detach()
    return statistics.median(ratios)


def decided(bench: Bench) -> bool:
    """Return whether ``forensics="auto"`` keeps anything of this model's steps."""
    monitor = gradwatch.attach(bench.model, report=None)
    bench.steps(25)
    assert monitor._inspector is not None
    kept = monitor._inspector._capture.installed
    monitor.detach()
    return kept


def rows(letters: str, rounds: int, seconds: float) -> list[list[Any]]:
    """Return one row for each workload."""
    found = []
    for letter in letters:
        workload = WORKLOADS[letter]
        ratios, noise, step = healthy(Bench(workload.make, fused=False), rounds, seconds)
        plain, forward, both = failed(Bench(workload.make, fused=False))
        found.append(
            [
                f"({letter}) {workload.title}",
                f"{1e3 * step:.3g}",
                shown(ratios),
                shown(noise),
                f"{1e3 * forward:.3g} ({forward / plain:.2f})",
                f"{1e3 * both:.3g} ({both / plain:.2f})",
                "-" if (steps := failing(workload)) is None else f"{steps:.1f}",
                "yes" if decided(Bench(workload.make, fused=False)) else "no",
            ]
        )
        print(" | ".join(found[-1]), flush=True)
    return found


HEAD = [
    "workload",
    "step, ms",
    "kept / not kept",
    "noise",
    "forward repeated, ms (steps)",
    "forward and backward repeated, ms (steps)",
    "a step that fails in its backward, in steps",
    '"auto" keeps',
]
NOTE = f"medians and quartiles; repetitions: the smallest of five, in time of the thread; torch {torch.__version__}, one thread"
