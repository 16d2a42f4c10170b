"""Runs to which a method is applied: of the fault set, of the toys and of the examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.device_path import on_device
from benchmarks.faults.labels import BY_NAME
from benchmarks.faults.toys import STEPS, TOYS
from benchmarks.pages import ROOT
from benchmarks.repair.examples import trained
from benchmarks.repair.methods import NORM, NOTHING, OLMO, OURS, OURS_BY_VALUE, RANDOM, VALUE, repaired
from benchmarks.repair.outcome import Outcome
from benchmarks.runs import digest, kept_at, run_missing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rich.console import Console

Job = tuple[str, str, str, int]  # what kind of training, which, with which method, seed
BASELINES = (NORM, VALUE, "ZClip", "AutoClip 90", "AGC 0.01", "AdaGC", RANDOM)
TOY_METHODS = (
    NOTHING,
    NORM,
    "always value 1.0",
    "ZClip",
    "AutoClip 90",
    "AGC 0.01",
    OLMO,
    OURS,
    OURS_BY_VALUE,
    on_device(OURS),
)
_OTHERS = {*BASELINES, NOTHING, OLMO, "always value 1.0"}
_OWN = tuple(f"benchmarks/repair/{name}.py" for name in ("examples", "methods", "outcome"))


def _do(job: Job) -> dict[str, Any]:
    kind, name, method, seed = job
    if kind == "training":
        return trained(name, seed)
    if kind == "toy":
        toy = next(toy for toy in TOYS if toy.name == name)
        return repaired(method, toy.train, seed, STEPS, name)
    program = BY_NAME[name]
    return repaired(method, program.faulty, seed, program.steps, name)


def _folder(method: str) -> Path:
    """Ours depends on all of gradwatch, always clipping on the clips alone."""
    package = "gradwatch/clips" if method in _OTHERS else "gradwatch"
    return (
        ROOT / "build" / "repair" / digest(package, "benchmarks/faults", "benchmarks/device_path.py", *_OWN, "examples")
    )


def run_all(jobs: Iterable[Job], console: Console, what: str) -> dict[Job, Outcome]:
    """Run what is not there yet; return what came of each."""
    jobs = list(dict.fromkeys(jobs))
    folders = {method: _folder(method) for method in {job[2] for job in jobs}}
    files = {job: kept_at(folders[job[2]], "/".join(map(str, job))) for job in jobs}
    return {job: Outcome(**found) for job, found in run_missing(_do, files, console, what).items()}
