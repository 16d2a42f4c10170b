"""Investigations of healthy trainings, of which there should be none: ``python -m benchmarks.forensics --healthy``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import gradwatch
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS
from benchmarks.pages import ROOT
from benchmarks.runs import digest, kept_at, run_missing

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

HEALTHY = {program.name: program for program in PROGRAMS if program.twin is None}


class Counted(Trace):
    """A run whose inputs are kept, and whose investigations are counted."""

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        super().watch(model)
        self.monitor = gradwatch.attach(model, report=None, strict=True, forensics=True)


def investigations_of(name: str) -> dict[str, Any]:
    """Run a program; return how many steps it made, and how many of them were investigated."""
    torch.set_num_threads(1)
    run, program = Counted(), HEALTHY[name]
    run_program(program.faulty, 0, program.steps, run)
    inspector = run.monitor._inspector
    assert inspector is not None
    run.monitor.detach()
    origins = [str(one.origin) for one in run.monitor.incidents if one.origin is not None]
    return {"steps": len(run.losses), "investigations": inspector.investigations, "origins": origins}


def healthy_told(console: Console, only: list[str] | None = None) -> str:
    """Run all healthy programs, or those whose names contain a text; return a sentence."""
    folder = ROOT / "build" / "forensics" / digest("gradwatch", "benchmarks/faults", "benchmarks/forensics/healthy.py")
    names = [name for name in HEALTHY if only is None or any(part in name for part in only)]
    found = run_missing(investigations_of, {name: kept_at(folder, name) for name in names}, console, "healthy programs")
    steps = sum(one["steps"] for one in found.values())
    looked = [name for name in names if found[name]["investigations"]]
    rare = sum(bool(HEALTHY[name].metric) for name in names)
    told = f"{len(names)} healthy programs of the fault set, {rare} of them with a rare signal, {steps:,} steps: "
    return told + (f"{len(looked)} investigated ({', '.join(looked)})." if looked else "not one investigation.")
