"""Repair of runs that begin a millionth apart. An explosion multiplies such a difference, so that a single run says little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.device_path import on_device
from benchmarks.faults.labels import BY_NAME, unwatched, within_reach
from benchmarks.faults.outcome import SEEDS
from benchmarks.faults.programs import halves
from benchmarks.pages import ROOT
from benchmarks.repair.judging import share
from benchmarks.repair.methods import NORM, OURS, repaired
from benchmarks.runs import digest, kept_at, run_missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from torch import nn

    from benchmarks.faults.program import Run

METHODS = (OURS, on_device(OURS), NORM)
HEAD = ["", *METHODS]
_RUNS = 5  # for each seed
_APART = 1e-6  # standard deviation of the relative change of each weight

Job = tuple[str, str, int, int]  # program, method, seed, which of the runs


def moved(train: Callable[[Run], Any], which: int) -> Callable[[Run], Any]:
    """Return a program whose first weights are changed by about a millionth of each."""

    def trained(run: Run) -> Any:
        watch = run.watch

        def watch_moved(model: nn.Module) -> None:
            generator = torch.Generator().manual_seed(which)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + _APART * torch.randn(parameter.shape, generator=generator))
            watch(model)

        run.watch = watch_moved  # type: ignore[method-assign]
        return train(run)

    return trained


def _do(job: Job) -> dict[str, Any]:
    name, method, seed, which = job
    program = BY_NAME[name]
    return repaired(method, moved(program.faulty, which), seed, program.steps, name)


def nearby_rows(names: Sequence[str], console: Console) -> list[list[str]]:
    """Run five runs of each seed of these programs with each method; return the shares that end within reach of the twin."""
    jobs = [
        (name, method, seed, which) for name in names for method in METHODS for seed in SEEDS for which in range(_RUNS)
    ]
    folder = ROOT / "build" / "nearby" / digest("gradwatch", "benchmarks/faults", "benchmarks/repair")
    found = run_missing(_do, {job: kept_at(folder, "/".join(map(str, job))) for job in jobs}, console, "nearby runs")
    reached = {job: within_reach(job[0], job[2], outcome["final"]) for job, outcome in found.items()}
    broken = [job for job in jobs if not within_reach(job[0], job[2], unwatched(job[0], job[2]))]
    half = halves()

    def row(title: str, programs: Sequence[str]) -> list[str]:
        return [
            title,
            *(share(reached[job] for job in broken if job[0] in programs and job[1] == method) for method in METHODS),
        ]

    of = {which: [name for name in names if half[name] == which] for which in ("development", "report")}
    return [
        *(row(f"{name} ({half[name]})", [name]) for name in names),
        *(row(f"all, {which} half", programs) for which, programs in of.items()),
    ]
