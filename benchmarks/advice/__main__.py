"""Follow the advice on trainings with a faulty configuration: ``python -m benchmarks.advice``.

Each faulty program whose cause is a configuration (a rate, an initialisation, activations, a recurrent network, the state of an
optimizer) is watched; the first advice of its first warning is followed, then the first two together, and the run is judged by
the program's repaired twin. Finished runs are kept below ``build/``.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import gradwatch
from benchmarks.advice.following import Change, Following, changes_for
from benchmarks.advice.table import rows_of
from benchmarks.detect.runs import Watched
from benchmarks.faults.labels import BY_NAME, within_reach
from benchmarks.faults.outcome import SEEDS, outcome_of
from benchmarks.faults.program import run_program
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.pages import ROOT, between_marks, markdown
from benchmarks.runs import digest, kept_at, run_missing

if TYPE_CHECKING:
    from collections.abc import Iterable

Result = dict[str, Any]
CONFIGURED = ("learning rate", "recurrent", "initialisation", "activations", "optimizer state")


def follow(name: str, seed: int) -> Result:
    """Watch a faulty program and follow the advice of its first warning; return what came of it."""
    torch.set_num_threads(1)
    program = BY_NAME[name]
    watched = Watched()
    run_program(program.faulty, seed, program.steps, watched)
    watched.monitor.detach()
    first = next((incident for incident in watched.monitor.incidents if incident.severity != "notice"), None)
    if first is None:
        return {"kind": None, "advice": [], "first": None, "both": None}
    ways = [changes_for(line) for line in first.advice[:2]]
    together = [way for way in ways if way]
    both = [_together(parts) for parts in itertools.product(*together)] if together else []
    alone = _healthy(name, seed, ways[0]) if ways and ways[0] else None
    return {
        "kind": first.kind,
        "advice": list(first.advice[:2]),
        "first": alone,
        "both": alone or _healthy(name, seed, both) if both else alone,
    }


def _together(parts: Iterable[Change]) -> Change:
    whole = Change()
    for part in parts:
        whole = whole.with_(part)
    return whole


def _healthy(name: str, seed: int, changes: Iterable[Change]) -> bool | None:
    """Return whether the run is healthy after any of these changes; None if none of them found anything to change."""
    program, found = BY_NAME[name], None
    for change in changes:
        following = Following(change)
        try:
            run_program(program.faulty, seed, program.steps, following)
        except gradwatch.TrainingUnstableError:
            return False
        finally:
            following.close()
        if following.changed:
            outcome = outcome_of(following, 0)
            found = outcome.nonfinite is None and within_reach(name, seed, outcome.final)
        if found:
            return True
    return found


def _do(job: str) -> Result:
    name, seed = job.rsplit("/", 1)
    return follow(name, int(seed))


def main() -> None:
    """Follow the advice and print the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.advice", description="Follow the advice on faulty trainings."
    )
    parser.add_argument("--half", choices=("development", "report", "both"), default="development")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--only", action="append", metavar="NAME", help="run only programs whose name contains this")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/advice.md")
    options = parser.parse_args()
    if options.write and (options.half, options.seeds, options.only) != ("both", len(SEEDS), None):
        parser.error("--write needs both halves, all seeds and all programs")
    console, drawn = Console(), halves()
    chosen = ("development", "report") if options.half == "both" else (options.half,)
    names = [
        program.name
        for program in PROGRAMS
        if program.twin is not None
        and program.family in CONFIGURED
        and drawn[program.name] in chosen
        and (options.only is None or any(part in program.name for part in options.only))
    ]
    folder = ROOT / "build" / "advice" / digest("gradwatch", "benchmarks/faults", "benchmarks/advice")
    jobs = [f"{name}/{seed}" for name in names for seed in range(options.seeds)]
    results = run_missing(_do, {job: kept_at(folder, job) for job in jobs}, console, "advice")
    text = ""
    for half in chosen:
        those = [results[job] for job in jobs if drawn[job.rsplit("/", 1)[0]] == half]
        silent = sum(one["kind"] is None for one in those)
        head = ["first warning", "runs", "healthy after the first advice", "healthy after the first two"]
        text += f"{half} half, {len(those)} runs, {silent} of them without a warning:\n\n{markdown(head, rows_of(those))}\n\n"
    text += "Not healthy after the first two, or without a change that a program can make:\n\n"
    for job in jobs:
        if results[job]["kind"] is not None and not results[job]["both"]:
            text += f"* {job.replace('/', ', seed ')}: {results[job]['kind']}; {' '.join(results[job]['advice'])}\n"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.write:
        between_marks(ROOT / "docs" / "advice.md", "advice", text.strip())


if __name__ == "__main__":
    main()
