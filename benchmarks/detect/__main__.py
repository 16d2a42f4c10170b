"""Measure detection and false alarms on the fault set: ``python -m benchmarks.detect``.

Every program of the fault set (faulty ones, their repaired twins, and healthy ones) is run over three seeds and watched by
gradwatch with its defaults. The untuned detectors of `detectors.py` use the recorded numbers of the same runs, since watching
does not change a run. Finished runs are kept below ``build/`` until gradwatch or the fault set changes, so that the command can
be interrupted and continued.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from benchmarks.detect.detectors import BASELINES
from benchmarks.detect.runs import run_all
from benchmarks.detect.scores import OURS, later_there, misses, scores, toy_rows
from benchmarks.device_path import on_device
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.pages import ROOT, between_marks, markdown

Scores = dict[str, str]
GOALS = {
    "recall, all faulty runs": "97 %",
    "healthy runs with a false alarm": "at most 1 %",
    "paired recall": "95 %",
    "alarm before divergence": "80 %",
    "first incident's kind is a measured symptom": "95 %",
    "prime suspect is the faulty layer": "90 %",
    "incidents in one faulty run": "median 1, at most 3",
    "the last word is not healthy, of runs that end worse than their twin": "97 %",
    "the last word is healthy, of healthy runs": "99 %",
    "first alarm later on the device path": "at most 2 steps",
}


def main() -> None:
    """Run the programs and print the scores."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.detect",
        description="Measure detection on the fault set, compared with untuned detectors.",
    )
    parser.add_argument("--half", choices=("development", "report", "both"), default="both")
    parser.add_argument("--misses", action="store_true", help="list the errors of gradwatch")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/detection.md")
    options = parser.parse_args()
    console = Console()
    half_of = halves()
    chosen = ("development", "report") if options.half == "both" else (options.half,)
    programs = {half: [p for p in PROGRAMS if half_of[p.name] == half] for half in chosen}
    names = {program.name for half in programs.values() for program in half}
    results, there = run_all(names, console), run_all(names, console, there=True)
    texts = []
    for half, those in programs.items():
        faulty = sum(program.twin is not None for program in those)
        title = f"{half} half: {faulty} faulty programs with their twins, {len(those) - faulty} healthy ones, 3 seeds"
        ours, on_devices = scores(those, results, OURS), scores(those, there, OURS)
        ours["first alarm later on the device path"] = ""
        on_devices["first alarm later on the device path"] = later_there(those, results, there)
        table = Table(title=title, title_justify="left")
        for column in ("", OURS, on_device(OURS), *BASELINES):
            table.add_column(column)
        others = {name: scores(those, results, name) for name in BASELINES}
        for row, value in ours.items():
            table.add_row(row, value, on_devices[row], *(others[name].get(row, "") for name in BASELINES))
        console.print(table)
        texts.append((half, title, ours, on_devices, others))
        if options.misses:
            for line in misses(those, results) + [on_device(line) for line in misses(those, there)]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    toys = toy_rows(results)
    for name, told in toys:
        console.print(f"{name}: {told}")
    if options.write:
        _write(texts, toys, misses([p for half in programs.values() for p in half], results))


def _write(
    texts: list[tuple[str, str, Scores, Scores, dict[str, Scores]]],
    toys: list[list[str]],
    wrong: list[str],
) -> None:
    rows = [
        [row, GOALS.get(row, ""), *(one[row] for _, _, ours, on_devices, _ in texts for one in (ours, on_devices))]
        for row in texts[0][2]
    ]
    first = markdown(["", "goal", *(name for half, *_ in texts for name in (f"{half} half", on_device(half)))], rows)
    half, _, ours, _, others = texts[-1]
    four = [row for row in ours if row in next(iter(others.values()))]
    beside = [
        [name, *(found[row].partition(" (")[0] for row in four)] for name, found in ((OURS, ours), *others.items())
    ]
    second = f"Compared with untuned detectors on the same runs, {half} half:\n\n" + markdown(["", *four], beside)
    third = "On the toy trainings on which other tools were tested:\n\n" + markdown(["", OURS], toys)
    between_marks(ROOT / "docs" / "detection.md", "summary", "\n\n".join((first, second, third)))
    parts = []
    for _, title, ours, on_devices, others in texts:
        named = ((OURS, ours), (on_device(OURS), on_devices), *others.items())
        lines = [[name, *(found[row] for row in four)] for name, found in named]
        parts.append(f"{title}:\n\n" + markdown(["", *four], lines))
    parts.append("The toy trainings:\n\n" + markdown(["", "gradwatch"], toys))
    parts.append("Errors of gradwatch, by program:\n\n" + "\n".join(f"* {line}" for line in wrong))
    between_marks(ROOT / "docs" / "detection.md", "detection", "\n\n".join(parts))


if __name__ == "__main__":
    main()
