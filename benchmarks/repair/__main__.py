"""Measure repair of faulty trainings and harm to healthy ones: ``python -m benchmarks.repair``.

Prints five tables: the regression of the examples, the faults that clipping can repair, harm to healthy programs, the toy
trainings, and two trainings of the examples. Finished runs are kept below ``build/`` until the code that they used changes, so
that the command can be interrupted and continued.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as DrawnTable

from benchmarks.device_path import on_device
from benchmarks.faults.outcome import SEEDS
from benchmarks.faults.programs import PROGRAMS
from benchmarks.faults.toys import TOYS
from benchmarks.pages import ROOT, between_marks, markdown
from benchmarks.repair.ablation import HEAD, ablation_rows
from benchmarks.repair.examples import DIGITS, REGRESSION, SEQUENCES
from benchmarks.repair.methods import NORM, NOTHING, OURS, VALUE
from benchmarks.repair.nearby import HEAD as NEARBY_HEAD
from benchmarks.repair.nearby import nearby_rows
from benchmarks.repair.runs import BASELINES, TOY_METHODS, Job, run_all
from benchmarks.repair.tables import (
    OURS_ANYWHERE,
    Row,
    fault_rows,
    harm_rows,
    nonfinite_rows,
    regression_rows,
    repairable,
    toy_rows,
    training_rows,
    unrepaired,
)

if TYPE_CHECKING:
    from benchmarks.repair.outcome import Outcome

_HALVES = ["development half", "report half"]
_FAULTY = [program.name for program in PROGRAMS if program.twin is not None]
Table = tuple[list[str], list[Row]]


def _run(console: Console, healthy: list[str]) -> tuple[dict[Job, Outcome], list[str]]:
    """Return the outcomes of all runs, and the programs that clipping can repair, which are found by the first runs."""
    first = (NORM, VALUE, *OURS_ANYWHERE)
    results = run_all([("fault", n, m, s) for n in _FAULTY for m in first for s in SEEDS], console, "faults")
    names = repairable(results)
    others = [m for m in BASELINES if m not in (NORM, VALUE)]
    jobs: list[Job] = [("fault", n, m, s) for n in names for m in others for s in SEEDS]
    jobs += [("fault", n, m, s) for n in healthy for m in (NOTHING, OURS, on_device(OURS), NORM) for s in SEEDS]
    jobs += [("toy", toy.name, m, s) for toy in TOYS for m in TOY_METHODS for s in range(toy.seeds)]
    jobs += [("training", name, OURS, s) for name in REGRESSION for s in range(5)]
    jobs += [("training", name, OURS, s) for name in (*DIGITS, *SEQUENCES) for s in SEEDS]
    return results | run_all(jobs, console, "the rest"), names


def _told(
    results: dict[Job, Outcome], names: list[str], healthy: list[str]
) -> tuple[dict[str, Table], dict[str, list[str]]]:
    """Return the tables and the lists by their titles."""
    harmed, touched = harm_rows(results, healthy)
    ended, lost = nonfinite_rows(results)
    errors = ["", "train error", "test error", "worst test error", "runs with NaN"]
    harms = ["", "programs worse by 5 %", "by 25 %", "steps touched", "runs touched"]
    toys = ["", *(f"{toy.name} ({toy.seeds})" for toy in TOYS)]
    tables: dict[str, Table] = {
        "1. The regression, medians of 5 seeds": (errors, regression_rows(results)),
        f"2. Runs repaired, of the {len(names)} programs that always clipping repairs": (
            ["", *_HALVES],
            fault_rows(results, names),
        ),
        "Runs that end non-finite unwatched: share that ends finite, or is stopped with finite parameters": (
            ["", *_HALVES],
            ended,
        ),
        f"3. Harm to the {len(healthy)} healthy programs": (harms, harmed),
        "4. The toy trainings: runs that end non-finite, median final loss": (toys, toy_rows(results)),
        "5. Digits (accuracy) and sequences (last loss), three seeds": (
            ["", "", "seeds 0, 1, 2"],
            training_rows(results),
        ),
    }
    lists = {
        "Repairable, but not repaired by auto-clip:": unrepaired(results, names),
        "Neither finite nor stopped in time:": lost,
        "Healthy runs that auto-clip touched:": touched,
    }
    return tables, lists


def _print(console: Console, tables: dict[str, Table], lists: dict[str, list[str]]) -> None:
    for title, (head, rows) in tables.items():
        table = DrawnTable(title=title, title_justify="left")
        for column in head:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for title, lines in lists.items():
        console.print(title, *(lines or ["none"]), sep="\n", markup=False, highlight=False, soft_wrap=True)


def _write(tables: dict[str, Table], lists: dict[str, list[str]]) -> None:
    parts = [f"## {title}\n\n{markdown(head, rows)}" for title, (head, rows) in tables.items()]
    for title, lines in lists.items():
        parts.append(f"## {title[:-1]}\n\n" + "\n".join(f"* {line}" for line in lines or ["none"]))
    between_marks(ROOT / "docs" / "repair.md", "repair", "\n\n".join(parts))


def main() -> None:
    """Run the programs and print the tables."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.repair", description="Measure repair and harm by auto-clip and by other ways to clip."
    )
    parser.add_argument("--write", action="store_true", help="write the tables to docs/repair.md")
    parser.add_argument(
        "--ablate", action="store_true", help="run auto-clip without one of its parts at a time instead"
    )
    parser.add_argument(
        "--nearby",
        action="store_true",
        help="run the repairable faults five times each, from weights a millionth apart",
    )
    options = parser.parse_args()
    console = Console()
    if options.ablate:
        rows = ablation_rows(console)
        _print(console, {"Auto-clip without one of its parts": (HEAD, rows)}, {})
        if options.write:
            between_marks(ROOT / "docs" / "repair.md", "ablation", markdown(HEAD, rows))
        return
    if options.nearby:
        always: list[Job] = [
            ("fault", name, method, seed) for name in _FAULTY for method in (NORM, VALUE) for seed in SEEDS
        ]
        rows = nearby_rows(repairable(run_all(always, console, "faults")), console)
        _print(
            console,
            {"Repairable faults, five runs each a millionth apart: share within reach": (NEARBY_HEAD, rows)},
            {},
        )
        if options.write:
            between_marks(ROOT / "docs" / "repair.md", "nearby", markdown(NEARBY_HEAD, rows))
        return
    healthy = [program.name for program in PROGRAMS if program.twin is None]
    results, names = _run(console, healthy)
    tables, lists = _told(results, names, healthy)
    _print(console, tables, lists)
    if options.write:
        _write(tables, lists)


if __name__ == "__main__":
    main()
