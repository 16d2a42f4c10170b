"""Rows of the tables: runs repaired, runs harmed, and trainings under several policies."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from benchmarks.device_path import on_device
from benchmarks.faults.labels import LABEL, unwatched, within_reach
from benchmarks.faults.outcome import SEEDS
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.faults.toys import TOYS
from benchmarks.repair.examples import DIGITS, REGRESSION, SEQUENCES
from benchmarks.repair.judging import share, worse
from benchmarks.repair.methods import NORM, NOTHING, OURS, OURS_BY_VALUE, VALUE
from benchmarks.repair.runs import BASELINES, TOY_METHODS

if TYPE_CHECKING:
    from benchmarks.repair.outcome import Outcome
    from benchmarks.repair.runs import Job

Row = list[str]
OURS_ANYWHERE = (OURS, on_device(OURS), OURS_BY_VALUE, on_device(OURS_BY_VALUE))


# Faults that clipping can repair.


def repairable(results: dict[Job, Outcome]) -> list[str]:
    """Return the faulty programs that end within reach of their twin only if always clipped, on two of three seeds at least."""
    found = []
    for program in PROGRAMS:
        if program.twin is None:
            continue
        broken = [seed for seed in SEEDS if not within_reach(program.name, seed, unwatched(program.name, seed))]
        best = max(
            sum(within_reach(program.name, seed, results["fault", program.name, method, seed].final) for seed in broken)
            for method in (NORM, VALUE)
        )
        if 3 * len(broken) >= 2 * len(SEEDS) and 3 * best >= 2 * len(SEEDS):
            found.append(program.name)
    return found


def fault_rows(results: dict[Job, Outcome], names: list[str]) -> list[Row]:
    """Return a row for each method: the share of runs that it repairs, for each half."""
    half = halves()
    rows = []
    for method in (*OURS_ANYWHERE, *BASELINES):
        row = [method]
        for which in ("development", "report"):
            runs = [(n, s) for n in names if half[n] == which for s in SEEDS if not within_reach(n, s, unwatched(n, s))]
            row.append(share(within_reach(n, s, results["fault", n, method, s].final) for n, s in runs))
        rows.append(row)
    return rows


def unrepaired(results: dict[Job, Outcome], names: list[str]) -> list[str]:
    """Return a line for each repairable program that auto-clip does not repair on some seed, with its first incident."""
    lines = []
    for name in names:
        runs = {seed: results["fault", name, OURS, seed] for seed in SEEDS}
        bad = [s for s, run in runs.items() if not within_reach(name, s, run.final)]
        if bad:
            first = runs[bad[0]]
            said = first.told[0] if first.told else "no incident opened"
            twin = LABEL[name][str(bad[0])]["twin"]["final"]
            seeds = "each seed" if len(bad) == len(SEEDS) else f"seed{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
            lines.append(
                f"{name} ({halves()[name]}), {seeds}: ends at {first.final:.3g}, the twin at {twin:.3g}; {said}"
            )
    return lines


def nonfinite_rows(results: dict[Job, Outcome]) -> tuple[list[Row], list[str]]:
    """Return which share of the runs that end non-finite unwatched ends well with auto-clip, and a line for each other run."""
    half, rows, lines = halves(), [], []
    for method in (OURS, on_device(OURS)):
        row = [method]
        for which in ("development", "report"):
            runs = [
                (p.name, seed)
                for p in PROGRAMS
                if p.twin is not None and half[p.name] == which
                for seed in SEEDS
                if not math.isfinite(unwatched(p.name, seed))
            ]
            row.append(share(results["fault", n, method, s].ended_well for n, s in runs))
            bad = [(n, s) for n, s in runs if not results["fault", n, method, s].ended_well]
            lines += [f"{method}: {n} ({which}), seed {s}" for n, s in bad]
        rows.append(row)
    return rows, lines


# Harm.


def _harms(results: dict[Job, Outcome], name: str, seed: int, method: str, by: float) -> bool:
    unclipped = results["fault", name, NOTHING, seed]
    first = LABEL[name][str(seed)]["healthy"]["first"] if unclipped.unlearned is None else unclipped.unlearned
    return worse(results["fault", name, method, seed], unclipped, first, by)


def harm_rows(results: dict[Job, Outcome], names: list[str]) -> tuple[list[Row], list[str]]:
    """Return a row for each method: programs harmed, steps touched; and a line for each run that auto-clip touched."""
    rows, lines = [], []
    for method in (OURS, on_device(OURS), NORM):
        runs = {(n, s): results["fault", n, method, s] for n in names for s in SEEDS}
        steps = sum(run.steps for run in runs.values())
        harmed = [share(any(_harms(results, n, s, method, by) for s in SEEDS) for n in names) for by in (0.05, 0.25)]
        touched = sum(run.touched for run in runs.values())
        rows.append(
            [method, *harmed, f"{100 * touched / steps:.2f} %", share(run.touched > 0 for run in runs.values())]
        )
    for method, name, seed in ((m, n, s) for m in (OURS, on_device(OURS)) for n in names for s in SEEDS):
        run = results["fault", name, method, seed]
        if run.touched:
            unclipped = results["fault", name, NOTHING, seed]
            verdict = "harmed" if _harms(results, name, seed, method, 0.05) else "no harm"
            lines.append(
                f"{method}: {name}, seed {seed}: {run.touched} steps, {unclipped.final:.3g} -> {run.final:.3g}, {verdict}"
            )
    return rows, lines


# Trainings.


def toy_rows(results: dict[Job, Outcome]) -> list[Row]:
    """Return a row for each method: for each toy, the number of runs that end non-finite and the median final loss."""
    rows = []
    for method in TOY_METHODS:
        row = [method]
        for toy in TOYS:
            runs = [results["toy", toy.name, method, seed] for seed in range(toy.seeds)]
            finals = [run.final if run.finite and math.isfinite(run.final) else math.inf for run in runs]
            row.append(f"{sum(map(math.isinf, finals))}, {statistics.median(finals):.2g}")
        rows.append(row)
    return rows


def regression_rows(results: dict[Job, Outcome]) -> list[Row]:
    """Return a row for each policy: errors of the regression, and the number of runs with NaN."""
    rows = []
    for name in REGRESSION:
        runs = [results["training", name, OURS, seed] for seed in range(5)]
        lost = sum(run.nonfinite is not None for run in runs)
        errors = (
            [statistics.median(run.errors[place] for run in runs) for place in (0, 1)] if not lost else [math.nan] * 2
        )
        worst = f"{max(run.errors[1] for run in runs):.3g}" if not lost else ""
        rows.append([name, *(f"{error:.3g}" for error in errors), worst, f"{lost} of 5"])
    return rows


def training_rows(results: dict[Job, Outcome]) -> list[Row]:
    """Return a row for each policy: accuracy on the digits, or loss on the sequences, for each seed."""
    rows = []
    for name in (*DIGITS, *SEQUENCES):
        runs = [results["training", name, OURS, seed] for seed in SEEDS]
        what = "accuracy" if name in DIGITS else "loss"
        rows.append([name, what, ", ".join(f"{run.errors[0]:.3g}" for run in runs)])
    return rows
