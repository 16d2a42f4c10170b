"""One model, one optimizer, and a monitor that can be switched off and on: what the benchmarks of cost are made of."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch.probe import optimizer_hooks, patches
from gradwatch.reports.live import LiveReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WARM = 70  # steps after which each variant is in its steady state


class Bench:
    """One model under one variant, with controls beside it."""

    def __init__(self, make: Callable[[], Any], *, fused: bool) -> None:
        torch.manual_seed(0)
        self.model, self.loss = make()
        self.parameters = list(self.model.parameters())
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.on_device = not self.parameters[0].is_cpu
        self.before_step: Callable[[], Any] | None = None
        self.clip_seconds = 0.0

    def steps(self, count: int) -> float:
        """Train; return the seconds of the process for one step."""
        clock = time.perf_counter if self.on_device else time.process_time
        started = clock()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            if self.before_step is not None:
                self.before_step()
            self.optimizer.step()
        if self.on_device:
            torch.cuda.synchronize()
        return (clock() - started) / count

    def clip(self) -> None:
        """What users do today, at a bound that clips nothing."""
        started = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 1e9)
        self.clip_seconds += time.perf_counter() - started


class Watched:
    """A monitor that can be switched off and on without losing what it has learned."""

    def __init__(self, bench: Bench, **settings: Any) -> None:
        report = None
        if settings.pop("report", None):  # a terminal that shows nothing
            nothing = io.TextIOWrapper(io.FileIO(os.devnull, "w"))
            report = LiveReport(Console(file=nothing, force_terminal=True, width=120, height=40))
        if settings.pop("log", None):
            self.folder = tempfile.TemporaryDirectory()
            settings["log"] = self.folder.name
        self.monitor = gradwatch.attach(bench.model, report=report, strict=True, **settings)
        self.probe = self.monitor._probe
        self.probe.recorder._every = 1  # the first rows are all judged, which is not the steady state
        bench.steps(WARM)
        self.probe.recorder._every = settings.get("every", 1)
        if "budget" in settings:  # settled while it sees all steps; with blocks of others between its own it could not
            bench.steps(10 * WARM)
            self.probe.recorder._budget = None
        self.off()

    def off(self) -> None:
        """Take every hook and patch away."""
        optimizer_hooks.unlisten(self.probe)
        for patch in patches.ALL:
            patch.remove(self.probe)
        hooked = self.probe.gradient_hooks
        self.hooked = [(column, hooked._layers.parameter(column)) for column in hooked._hooks]
        hooked.stop()

    def on(self) -> None:
        """Put them back."""
        optimizer_hooks.listen(self.probe)
        for patch in patches.ALL:
            patch.add(self.probe)
        for column, parameter in self.hooked:
            if parameter is not None:
                self.probe.gradient_hooks._hooks[column] = self.probe.gradient_hooks._hook(column, parameter)

    @contextmanager
    def switched_on(self) -> Iterator[None]:
        """Watch for a while."""
        self.on()
        try:
            yield
        finally:
            self.off()


def shown(values: list[float]) -> str:
    """Return the median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"
