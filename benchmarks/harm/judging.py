"""What is harm to a signal that is rare, and the rows of its table."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.device_path import on_device
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.repair.judging import worse
from benchmarks.repair.methods import NOTHING, OURS, OURS_BY_VALUE, WATCHED
from benchmarks.repair.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.faults.program import Program
    from benchmarks.repair.runs import Job

Results = dict["Job", Outcome]
RARE = tuple(program for program in PROGRAMS if program.metric)
ARMED = {
    "norm": OURS,
    "value": OURS_BY_VALUE,
    on_device("norm"): on_device(OURS),
    on_device("value"): on_device(OURS_BY_VALUE),
}
_WORSE = 0.05


def methods(clips: Sequence[str]) -> list[str]:
    """Return the armed methods of these clips."""
    return [ARMED[clip] for clip in clips]


def runs_of(results: Results, name: str, method: str, seeds: int) -> list[Outcome]:
    """Return a program's runs with a method, by seed."""
    return [results["fault", name, method, seed] for seed in range(seeds)]


def harmed(run: Outcome, unwatched: Outcome) -> list[str]:
    """Return what of the loss and the metric is worse by 5 %; a run that was stopped has neither."""
    found = []
    if worse(run, unwatched, unwatched.unlearned or 0.0, _WORSE):
        found.append("loss")
    if (
        run.metric is None
        or unwatched.metric is None
        or not run.metric >= unwatched.metric - _WORSE * abs(unwatched.metric)
    ):
        found.append("metric")
    return found


def median_of(runs: Sequence[Outcome]) -> Outcome:
    """Return the run that a program's runs are in the middle; one that was stopped is worse than any."""
    losses = [float("inf") if run.metric is None else run.final for run in runs]
    metrics = [-float("inf") if run.metric is None else run.metric for run in runs]
    unlearned = statistics.median(run.unlearned or 0.0 for run in runs)
    return Outcome(
        runs[0].steps,
        statistics.median(losses),
        None,
        None,
        all(run.finite for run in runs),
        unlearned=unlearned,
        metric=statistics.median(metrics),
    )


def check_watching(results: Results, programs: Sequence[Program], seeds: int) -> None:
    """Raise an error where a run that was only watched is not the unwatched one to the bit."""
    for program in programs:
        pairs = zip(*(runs_of(results, program.name, method, seeds) for method in (NOTHING, WATCHED)), strict=True)
        differ = [seed for seed, (unwatched, watched) in enumerate(pairs) if unwatched.bits != watched.bits]
        if differ:
            raise AssertionError(f"{program.name}, seeds {differ}: watching changed losses or weights")


def row_of(results: Results, program: Program, clips: Sequence[str], seeds: int) -> list[str]:
    """Return a program's row of the table."""
    runs = {method: runs_of(results, program.name, method, seeds) for method in (NOTHING, WATCHED, *methods(clips))}
    middle = {method: median_of(those) for method, those in runs.items() if method != WATCHED}
    alarms = sum(bool(run.alarms) for run in runs[WATCHED])
    touched, verdicts = [], []
    for method in methods(clips):
        touched.append(
            f"{100 * sum(run.touched for run in runs[method]) / sum(run.steps for run in runs[method]):.2g} %"
        )
        what = harmed(middle[method], middle[NOTHING])
        count = sum(bool(harmed(*pair)) for pair in zip(runs[method], runs[NOTHING], strict=True))
        verdicts.append(f"{' and '.join(what) or 'no'} ({count} of {seeds})")
    return [
        program.name.removeprefix("healthy: "),
        halves()[program.name],
        f"{alarms} of {seeds}",
        ", ".join(touched),
        ", ".join(f"{one.final:.3g}" for one in middle.values()),
        ", ".join(f"{one.metric:.3f}" for one in middle.values()) + f" {program.metric}",
        *verdicts,
    ]


def summary(results: Results, programs: Sequence[Program], clips: Sequence[str], seeds: int) -> list[str]:
    """Return a line for each half and clip: programs that end worse, runs with an alarm, runs touched."""
    lines = []
    for half in dict.fromkeys(halves()[program.name] for program in programs):
        those = [program.name for program in programs if halves()[program.name] == half]
        watched = [run for name in those for run in runs_of(results, name, WATCHED, seeds)]
        text = f"{half} half: {sum(bool(run.alarms) for run in watched)} of {len(watched)} runs with an alarm"
        for clip in clips:
            pairs = [
                (runs_of(results, name, ARMED[clip], seeds), runs_of(results, name, NOTHING, seeds)) for name in those
            ]
            bad = sum(bool(harmed(median_of(armed), median_of(plain))) for armed, plain in pairs)
            touched = sum(run.touched > 0 for armed, _ in pairs for run in armed)
            text += f"; by {clip} {bad} of {len(those)} programs worse, {touched} of {len(watched)} runs touched"
        lines.append(text)
    return lines


def told(results: Results, programs: Sequence[Program], seeds: int) -> list[str]:
    """Return a line for each program with an alarm: the first one."""
    lines = []
    for program in programs:
        runs = enumerate(runs_of(results, program.name, WATCHED, seeds))
        first = next(((seed, run.alarms) for seed, run in runs if run.alarms), None)
        if first is not None:
            more = f", and {len(first[1]) - 1} more" if len(first[1]) > 1 else ""
            lines.append(f"{program.name}, seed {first[0]}: {first[1][0]}{more}")
    return lines
