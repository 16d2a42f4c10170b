"""Runs that gradwatch watches with its defaults, and what it and the other detectors said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import gradwatch
from benchmarks.detect.detectors import BASELINES
from benchmarks.device_path import ON_DEVICE, device_path, on_device
from benchmarks.faults.outcome import SEEDS, outcome_of
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS
from benchmarks.faults.toys import STEPS, TOYS
from benchmarks.pages import ROOT
from benchmarks.runs import digest, kept_at, run_missing
from gradwatch.reports.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

Result = dict[str, Any]
_OWN = ("benchmarks/device_path.py", "benchmarks/detect/detectors.py", "benchmarks/detect/runs.py")
_PROGRAM = {program.name: program for program in PROGRAMS}
_TOY = {f"toy {toy.name}": toy for toy in TOYS}


class Watched(Trace):
    """A recorded run that gradwatch watches with its defaults."""

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        super().watch(model)
        self.monitor = gradwatch.attach(model, report=None, strict=True)
        self.alarm: dict[str, Any] | None = None

    def step(self, loss: float) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        super().step(loss)
        if self.alarm is None:
            grave = [incident for incident in self.monitor.incidents if incident.severity != "notice"]
            if grave:
                first = grave[0]
                self.alarm = {"step": len(self.losses) - 1, "kind": first.kind, "suspect": first.suspect}


def watched_run(train: Any, seed: int, steps: int, onset: int) -> Result:
    """Run once; return what gradwatch and the baselines said, and what became of it."""
    torch.set_num_threads(1)
    trace = Watched()
    run_program(train, seed, steps, trace)
    trace.monitor.detach()
    incidents, summary = trace.monitor.incidents, trace.monitor.summary()
    assert isinstance(summary, Summary)
    outcome = outcome_of(trace, onset)
    return {
        "alarm": trace.alarm,
        "grave": [[i.kind, i.opened_step, i.suspect] for i in incidents if i.severity != "notice"],
        "notices": [[i.kind, i.opened_step] for i in incidents if i.severity == "notice"],
        "codes": sorted({sign.code for i in incidents if i.severity != "notice" for sign in i.signs}),
        "baselines": {name: detect(trace) for name, detect in BASELINES.items()},
        "verdict": trace.monitor.verdict,
        "ending": summary.snapshot.ending,
        "final": outcome.final,
        "diverged": outcome.diverged,
        "nonfinite": outcome.nonfinite,
        "growth": outcome.growth,
    }


def _do(job: str) -> Result:
    """Make the run that a job names: ``program/which/seed``, on the device path if its name ends so."""
    with device_path(on=job.endswith(ON_DEVICE)):
        return _run(*job.removesuffix(ON_DEVICE).rsplit("/", 2))


def _run(name: str, which: str, seed: str) -> Result:
    if which == "toy":
        toy = _TOY[name]
        return watched_run(toy.train, int(seed), STEPS, toy.onset or 0)
    program = _PROGRAM[name]
    train = program.twin if which == "twin" else program.faulty
    return watched_run(train, int(seed), program.steps, program.onset if which == "faulty" else 0)


def _jobs(only: set[str]) -> list[str]:
    jobs = []
    for program in PROGRAMS:
        if program.name in only:
            for which in ("faulty", "twin") if program.twin is not None else ("healthy",):
                jobs += [f"{program.name}/{which}/{seed}" for seed in SEEDS]
    return jobs + [f"{name}/toy/{seed}" for name, toy in _TOY.items() for seed in range(toy.seeds)]


def run_all(only: set[str], console: Console, *, there: bool = False) -> dict[str, Result]:
    """Run what is not there yet; return the results of these programs and of all toys by ``program/which/seed``.

    ``there``: on the device path.
    """
    sources = digest("gradwatch", "benchmarks/faults", *_OWN)
    folder = ROOT / "build" / "detect" / sources
    jobs = {on_device(job) if there else job: job for job in _jobs(only)}
    found = run_missing(_do, {job: kept_at(folder, job) for job in jobs}, console, "watched runs")
    return {jobs[job]: result for job, result in found.items()}
