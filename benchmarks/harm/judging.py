"""What auto-clip does to healthy programs whose signal is rare or bursty: ``python -m benchmarks.harm``.

Each is run over five seeds: unwatched, only watched, and with auto-clip by norm and by value; judged by data held out. Finished
runs are kept below ``build/``, as those of `benchmarks.repair` are, which counts the same programs as healthy ones.
"""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.pages import ROOT, between_marks, markdown
from benchmarks.repair.methods import NOTHING, OURS, OURS_BY_VALUE, WATCHED, Outcome
from benchmarks.repair.tables import run_all, worse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.faults.program import Program
    from benchmarks.repair.tables import Job

Results = dict["Job", Outcome]
RARE = tuple(program for program in PROGRAMS if program.metric)
ARMED = {"norm": OURS, "value": OURS_BY_VALUE}
_WORSE = 0.05


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


def methods(clips: Sequence[str]) -> list[str]:
    """Return the armed methods of these clips."""
    return [ARMED[clip] for clip in clips]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="What auto-clip does to healthy programs whose signal is rare.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/repair.md")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="programs with this in their name; can be repeated"
    )
    parser.add_argument("--half", choices=("development", "report", "both"), default="both")
    parser.add_argument("--clip", choices=("norm", "value", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.write and (options.only, options.half, options.clip, options.seeds) != (None, "both", "both", 5):
        parser.error("--write needs all programs, both halves, both clips and five seeds")
    clips = ("norm", "value") if options.clip == "both" else (options.clip,)
    programs = [
        program
        for program in RARE
        if options.half in ("both", halves()[program.name])
        and (options.only is None or any(part in program.name for part in options.only))
    ]
    if not programs:
        parser.error(f"no program is called {options.only} in this half; there are: {', '.join(p.name for p in RARE)}")
    console = Console()
    seeds = range(options.seeds)
    jobs: list[Job] = [
        ("fault", program.name, method, seed)
        for program in programs
        for method in (NOTHING, WATCHED, *methods(clips))
        for seed in seeds
    ]
    results = run_all(jobs, console, "rare signals")
    check_watching(results, programs, options.seeds)
    head = ["", "half", "alarms", f"steps touched by {', '.join(clips)}", f"loss: unwatched, {', '.join(clips)}"]
    head += [f"metric: unwatched, {', '.join(clips)}", *(f"worse by {clip}" for clip in clips)]
    table = markdown(head, [row_of(results, program, clips, options.seeds) for program in programs])
    lines = summary(results, programs, clips, options.seeds)
    first = told(results, programs, options.seeds)
    for text in (table, *lines, *first):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.write:
        text = "\n".join(f"* {line}" for line in lines)
        text += f"\n\n{table}\n\nThe first alarm of each program that has one:\n\n"
        text += "\n".join(f"* {line}" for line in first or ["none"])
        between_marks(ROOT / "docs" / "repair.md", "rare", text)


if __name__ == "__main__":
    main()
