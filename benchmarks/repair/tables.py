"""What repairs a training, and what harms a healthy one: ``python -m benchmarks.repair``.

Five tables: the regression of the examples, the faults that clipping can repair, harm to healthy programs, the peers' toys, and
two trainings of the examples. Finished runs are kept below ``build/`` until what they ran on changes, so that the command can
be broken off and taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.faults.outcome import SEEDS
from benchmarks.faults.programs import LABELS, PROGRAMS, halves
from benchmarks.faults.toys import STEPS, TOYS
from benchmarks.pages import ROOT, between_marks, markdown
from benchmarks.repair.methods import (
    DIGITS,
    NORM,
    NOTHING,
    OLMO,
    OURS,
    OURS_BY_VALUE,
    RANDOM,
    REGRESSION,
    SEQUENCES,
    VALUE,
    Outcome,
    repaired,
    trained,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Row = list[str]
Job = tuple[str, str, str, int]  # what kind of training, which, with which method, seed
BASELINES = (NORM, VALUE, "ZClip", "AutoClip 90", "AGC 0.01", "AdaGC", RANDOM)
TOY_METHODS = (NOTHING, NORM, "always value 1.0", "ZClip", "AutoClip 90", "AGC 0.01", OLMO, OURS, OURS_BY_VALUE)
LABEL: dict[str, dict[str, dict[str, Any]]] = json.loads(LABELS.read_text())
BY_NAME = {program.name: program for program in PROGRAMS}


def _do(job: Job) -> dict[str, Any]:
    kind, name, method, seed = job
    if kind == "training":
        return trained(name, seed)
    if kind == "toy":
        toy = next(toy for toy in TOYS if toy.name == name)
        return repaired(method, toy.train, seed, STEPS, name)
    program = BY_NAME[name]
    return repaired(method, program.faulty, seed, program.steps, name)


def _digest(*places: str) -> str:
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _folder(method: str) -> Path:
    """Ours depends on all of gradwatch, always clipping on the clips alone."""
    package = "gradwatch/clips" if method in (*BASELINES, *TOY_METHODS[:-2]) else "gradwatch"
    return ROOT / "build" / "repair" / _digest(package, "benchmarks/faults", "benchmarks/repair/methods.py", "examples")


def run_all(jobs: Iterable[Job], console: Console, what: str) -> dict[Job, Outcome]:
    """Run what is not there yet, on two processes; return what came of each."""
    results: dict[Job, Outcome] = {}
    missing: dict[Job, Path] = {}
    folders: dict[str, Path] = {}
    for job in dict.fromkeys(jobs):
        folder = folders.setdefault(job[2], _folder(job[2]))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (hashlib.sha256("/".join(map(str, job)).encode()).hexdigest()[:16] + ".json")
        if path.exists():
            results[job] = Outcome(**json.loads(path.read_text()))
        else:
            missing[job] = path
    failed: dict[Job, Exception] = {}
    with ProcessPoolExecutor(2) as pool:
        running = {pool.submit(_do, job): job for job in missing}
        for done in track(as_completed(running), total=len(running), description=what, console=console):
            job = running[done]
            try:
                found = done.result()
            except Exception as error:  # the others' results shall be kept before this one ends the command
                failed[job] = error
                continue
            missing[job].write_text(json.dumps(found))
            results[job] = Outcome(**found)
    for job, cause in failed.items():
        raise RuntimeError(f"{job} failed: {cause!r}") from cause
    return results


# Faults that clipping can repair.


def within_reach(name: str, seed: int, final: float) -> bool:
    """True when a run ends as near to the repaired twin as the fault set asks of a program that is not faulty."""
    twin = LABEL[name][str(seed)]["twin"]
    return bool(final - twin["final"] <= 0.5 * max(abs(twin["final"]), 0.02 * abs(twin["first"])))


def repairable(results: dict[Job, Outcome]) -> list[str]:
    """Return the programs that always clipping brings within reach of their twin in two of three seeds, and nothing else does."""
    found = []
    for program in PROGRAMS:
        if program.twin is None:
            continue
        broken = [seed for seed in SEEDS if not within_reach(program.name, seed, _unwatched(program.name, seed))]
        best = max(
            sum(within_reach(program.name, seed, results["fault", program.name, method, seed].final) for seed in broken)
            for method in (NORM, VALUE)
        )
        if 3 * len(broken) >= 2 * len(SEEDS) and 3 * best >= 2 * len(SEEDS):
            found.append(program.name)
    return found


def _unwatched(name: str, seed: int) -> float:
    final: float = LABEL[name][str(seed)]["faulty" if BY_NAME[name].twin else "healthy"]["final"]
    return final


def fault_rows(results: dict[Job, Outcome], names: list[str]) -> list[Row]:
    """Return a row for each method: the runs that it repairs, by half."""
    half = halves()
    rows = []
    for method in (OURS, OURS_BY_VALUE, *BASELINES):
        row = [method]
        for which in ("development", "report"):
            runs = [
                (n, s) for n in names if half[n] == which for s in SEEDS if not within_reach(n, s, _unwatched(n, s))
            ]
            row.append(share(within_reach(n, s, results["fault", n, method, s].final) for n, s in runs))
        rows.append(row)
    return rows


def unrepaired(results: dict[Job, Outcome], names: list[str]) -> list[str]:
    """Return a line for each repairable program that auto-clip does not repair on some seed, with what it said."""
    lines = []
    for name in names:
        runs = {seed: results["fault", name, OURS, seed] for seed in SEEDS}
        bad = [s for s, run in runs.items() if not within_reach(name, s, run.final)]
        if bad:
            first = runs[bad[0]]
            said = first.told[0] if first.told else "no incident was opened: detection misses it"
            twin = LABEL[name][str(bad[0])]["twin"]["final"]
            seeds = "each seed" if len(bad) == len(SEEDS) else f"seed{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
            lines.append(
                f"{name} ({halves()[name]}), {seeds}: ends at {first.final:.3g}, the twin at {twin:.3g}; {said}"
            )
    return lines


def nonfinite_rows(results: dict[Job, Outcome]) -> tuple[list[Row], list[str]]:
    """Of the runs that end non-finite unwatched, how many end well, by half; and those that do not."""
    half, row, lines = halves(), ["auto-clip"], []
    for which in ("development", "report"):
        runs = [
            (p.name, seed)
            for p in PROGRAMS
            if p.twin is not None and half[p.name] == which
            for seed in SEEDS
            if not math.isfinite(_unwatched(p.name, seed))
        ]
        row.append(share(results["fault", n, OURS, s].ended_well for n, s in runs))
        lines += [f"{n} ({which}), seed {s}" for n, s in runs if not results["fault", n, OURS, s].ended_well]
    return [row], lines


def share(hits: Iterable[bool]) -> str:
    """Return a share as text."""
    found = list(hits)
    return f"{100 * sum(found) / len(found):.0f} % ({sum(found)}/{len(found)})" if found else "none to judge"


# Harm.


def worse(run: Outcome, unclipped: Outcome, first: float, by: float) -> bool:
    """True when a healthy run ends worse than unclipped by this share of its loss, or of 2 % of its first one."""
    return not run.final - unclipped.final <= by * max(abs(unclipped.final), 0.02 * abs(first))


def _harms(results: dict[Job, Outcome], name: str, seed: int, method: str, by: float) -> bool:
    unclipped = results["fault", name, NOTHING, seed]
    first = LABEL[name][str(seed)]["healthy"]["first"] if unclipped.unlearned is None else unclipped.unlearned
    return worse(results["fault", name, method, seed], unclipped, first, by)


def harm_rows(results: dict[Job, Outcome], names: list[str]) -> tuple[list[Row], list[str]]:
    """Return a row for each method: programs harmed, steps touched; and auto-clip's harm by program."""
    rows, lines = [], []
    for method in (OURS, NORM):
        runs = {(n, s): results["fault", n, method, s] for n in names for s in SEEDS}
        steps = sum(run.steps for run in runs.values())
        harmed = [share(any(_harms(results, n, s, method, by) for s in SEEDS) for n in names) for by in (0.05, 0.25)]
        touched = sum(run.touched for run in runs.values())
        rows.append(
            [method, *harmed, f"{100 * touched / steps:.2f} %", share(run.touched > 0 for run in runs.values())]
        )
    for name, seed in ((n, s) for n in names for s in SEEDS):
        run = results["fault", name, OURS, seed]
        if run.touched:
            unclipped = results["fault", name, NOTHING, seed]
            verdict = "harmed" if _harms(results, name, seed, OURS, 0.05) else "no harm"
            lines.append(
                f"{name}, seed {seed}: {run.touched} steps, {unclipped.final:.3g} -> {run.final:.3g}, {verdict}"
            )
    return rows, lines


# Trainings.


def toy_rows(results: dict[Job, Outcome]) -> list[Row]:
    """Return the toy table, a row for each method: runs that end non-finite, median final loss."""
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
    """Return the regression, a row for each policy."""
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
    """Return the digits and the sequences, a row for each policy."""
    rows = []
    for name in (*DIGITS, *SEQUENCES):
        runs = [results["training", name, OURS, seed] for seed in SEEDS]
        what = "accuracy" if name in DIGITS else "loss"
        rows.append([name, what, ", ".join(f"{run.errors[0]:.3g}" for run in runs)])
    return rows


# All of it.


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Repair and harm, beside other ways to clip.")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/repair.md")
    options = parser.parse_args()
    console = Console()
    faulty = [program.name for program in PROGRAMS if program.twin is not None]
    healthy = [program.name for program in PROGRAMS if program.twin is None]
    results = run_all(
        [("fault", n, m, s) for n in faulty for m in (NORM, VALUE, OURS, OURS_BY_VALUE) for s in SEEDS],
        console,
        "faults",
    )
    names = repairable(results)
    others = [m for m in BASELINES if m not in (NORM, VALUE)]
    jobs: list[Job] = [("fault", n, m, s) for n in names for m in others for s in SEEDS]
    jobs += [("fault", n, m, s) for n in healthy for m in (NOTHING, OURS, NORM) for s in SEEDS]
    jobs += [("toy", toy.name, m, s) for toy in TOYS for m in TOY_METHODS for s in range(toy.seeds)]
    jobs += [("training", name, OURS, s) for name in REGRESSION for s in range(5)]
    jobs += [("training", name, OURS, s) for name in (*DIGITS, *SEQUENCES) for s in SEEDS]
    results |= run_all(jobs, console, "the rest")
    harmed, touched = harm_rows(results, healthy)
    ended, lost = nonfinite_rows(results)
    halves_ = ["development half", "report half"]
    tables = {
        "1. The regression, medians of 5 seeds": (
            ["", "train error", "test error", "worst test error", "runs with NaN"],
            regression_rows(results),
        ),
        f"2. Runs repaired, of the {len(names)} programs that always clipping repairs": (
            ["", *halves_],
            fault_rows(results, names),
        ),
        "Runs that end non-finite unwatched, and end finite or in the stop with finite parameters": (
            ["", *halves_],
            ended,
        ),
        f"3. Harm to the {len(healthy)} healthy programs": (
            ["", "programs worse by 5 %", "by 25 %", "steps touched", "runs touched"],
            harmed,
        ),
        "4. The peers' toys: runs that end non-finite, median final loss": (
            ["", *(f"{toy.name} ({toy.seeds})" for toy in TOYS)],
            toy_rows(results),
        ),
        "5. Digits (accuracy) and sequences (last loss), three seeds": (
            ["", "", "seeds 0, 1, 2"],
            training_rows(results),
        ),
    }
    lists = {
        "Repairable, and not repaired by auto-clip:": unrepaired(results, names),
        "Not ended well:": lost,
        "Healthy runs that auto-clip touched:": touched,
    }
    for title, (head, rows) in tables.items():
        table = Table(title=title, title_justify="left")
        for column in head:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for title, lines in lists.items():
        console.print(title, *(lines or ["none"]), sep="\n", markup=False, highlight=False, soft_wrap=True)
    if options.write:
        parts = [f"## {title}\n\n{markdown(head, rows)}" for title, (head, rows) in tables.items()]
        parts += [
            f"## {title[:-1]}\n\n" + "\n".join(f"* {line}" for line in lines or ["none"])
            for title, lines in lists.items()
        ]
        between_marks(ROOT / "docs" / "repair.md", "repair", "\n\n".join(parts))
        between_marks(ROOT / "README.md", "repair", markdown(["", *halves_], fault_rows(results, names)))


if __name__ == "__main__":
    main()
