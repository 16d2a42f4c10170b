"""Auto-clip without one of its parts at a time: what each of them repairs, and what it costs."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from benchmarks.device_path import on_device
from benchmarks.faults.labels import LABEL, unwatched, within_reach
from benchmarks.faults.outcome import SEEDS
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.faults.toys import TOYS
from benchmarks.repair.methods import ABLATED, OURS, without
from benchmarks.repair.runs import run_all

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.repair.outcome import Outcome
    from benchmarks.repair.runs import Job

HEAD = [
    *("", "development half: within reach", "better, worse", "report half: within reach", "better, worse"),
    *(f"{toy.name} ({toy.seeds})" for toy in TOYS),
]
_APART = 0.1  # share of the loss, or of 2 % of the twin's first loss, by which a run ends better or worse


def ablation_rows(console: Console) -> list[list[str]]:
    """Run auto-clip whole and without each part, on both paths; return a row for each.

    A part that is left out changes nothing in a run that auto-clip does not touch, so such a run is made once.
    """
    rows = []
    faulty = [program.name for program in PROGRAMS if program.twin is not None]
    all_runs: list[tuple[str, str, int]] = [("fault", name, seed) for name in faulty for seed in SEEDS]
    all_runs += [("toy", toy.name, seed) for toy in TOYS for seed in range(toy.seeds)]
    for there in (False, True):
        whole = on_device(OURS) if there else OURS
        found = run_all([(kind, name, whole, seed) for kind, name, seed in all_runs], console, whole)
        touched = [(kind, name, seed) for (kind, name, _, seed), run in found.items() if run.touched or run.told]
        methods = {part: on_device(without(part)) if there else without(part) for part in ABLATED}
        jobs = [(kind, name, method, seed) for kind, name, seed in touched for method in methods.values()]
        found |= run_all(jobs, console, "without each part")
        rows += [_row(found, whole, method, faulty) for method in (whole, *methods.values())]
    return rows


def _row(found: dict[Job, Outcome], whole: str, method: str, faulty: list[str]) -> list[str]:
    row = [method]
    for half in ("development", "report"):
        finals = {
            (name, seed): (
                _final(found["fault", name, whole, seed]),
                _final(found.get(("fault", name, method, seed)) or found["fault", name, whole, seed]),
            )
            for name in faulty
            if halves()[name] == half
            for seed in SEEDS
        }
        broken = [run for run in finals if not within_reach(*run, unwatched(*run))]
        reached = sum(within_reach(*run, finals[run][1]) for run in broken)
        better = sum(_differ(run, *finals[run]) for run in finals)
        worse = sum(_differ(run, *reversed(finals[run])) for run in finals)
        row += [f"{reached} of {len(broken)}", f"{better}, {worse}" if method != whole else ""]
    for toy in TOYS:
        runs = [
            found.get(("toy", toy.name, method, seed)) or found["toy", toy.name, whole, seed]
            for seed in range(toy.seeds)
        ]
        row.append(f"{statistics.median(map(_final, runs)):.2g}")
    return row


def _final(run: Outcome) -> float:
    return run.final if math.isfinite(run.final) else math.inf


def _differ(run: tuple[str, int], high: float, low: float) -> bool:
    """Return whether a run ends lower by more than a tenth."""
    name, seed = run
    floor = 0.02 * abs(LABEL[name][str(seed)]["twin"]["first"])
    return low < high and (math.isinf(high) or high - low > _APART * max(abs(high), floor))
