"""The scores of the runs: shares with their intervals, the errors, and the toy trainings."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from benchmarks.faults.labels import within_reach
from benchmarks.faults.outcome import SEEDS, symptoms_of
from benchmarks.faults.toys import TOYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from benchmarks.detect.runs import Result
    from benchmarks.faults.program import Program

OURS = "gradwatch"
_EARLY = 5  # smallest number of steps between cause and divergence for which an alarm before divergence is expected


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927); NaN if ``of`` is zero."""
    if not of:
        return math.nan, math.nan
    z = 1.96
    share = hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(hits: Iterable[bool]) -> str:
    found = list(hits)
    low, high = wilson(sum(found), len(found))
    if not found:
        return "none to judge"
    return f"{100 * sum(found) / len(found):.0f} % ({sum(found)}/{len(found)}; {100 * low:.0f}-{100 * high:.0f})"


def _alarm(result: Result, detector: str) -> int | None:
    if detector != OURS:
        found: int | None = result["baselines"][detector]
        return found
    return None if result["alarm"] is None else int(result["alarm"]["step"])


def scores(programs: Sequence[Program], results: dict[str, Result], detector: str) -> dict[str, str]:
    """Return the scores of one detector, by the name of the row."""
    faulty = [(p, s, results[f"{p.name}/faulty/{s}"]) for p in programs if p.twin is not None for s in SEEDS]
    healthy = [results[f"{p.name}/{'twin' if p.twin else 'healthy'}/{s}"] for p in programs for s in SEEDS]
    found = [(p, result) for p, _, result in faulty if _found(p, result, detector)]
    early = [(p, r) for p, _, r in faulty if r["diverged"] is not None and r["diverged"] - p.onset >= _EARLY]
    rows = {
        "recall, all faulty runs": _share(_found(p, r, detector) for p, _, r in faulty),
        "healthy runs with a false alarm": _share(_alarm(r, detector) is not None for r in healthy),
        "paired recall": _share(
            _found(p, r, detector) and _alarm(results[f"{p.name}/twin/{s}"], detector) is None for p, s, r in faulty
        ),
        "alarm before divergence": _share(_found(p, r, detector) and _before(p, r, detector) for p, r in early),
    }
    if detector == OURS:
        grave = [len(r["grave"]) for _, _, r in faulty]
        rows |= {
            "first incident's kind is a measured symptom": _share(
                r["alarm"]["kind"] in symptoms_of(p, r["growth"]) for p, r in found
            ),
            "prime suspect is the faulty layer": _share(
                (r["alarm"]["suspect"] or "").startswith(p.suspect) for p, r in found if p.suspect is not None
            ),
            "incidents in one faulty run": f"median {statistics.median(grave):g}, at most {max(grave)}",
        }
        worse = [(p, r) for p, s, r in faulty if not within_reach(p.name, s, r["final"])]
        rows |= {
            "the last word is not healthy, of runs that end worse than their twin": _share(
                r["verdict"] != "healthy" for _, r in worse
            ),
            "or a sentence beside it says how the loss stands": _share(
                r["verdict"] != "healthy" or bool(r["ending"]) for _, r in worse
            ),
            "the last word is healthy, of healthy runs": _share(r["verdict"] == "healthy" for r in healthy),
            "and no sentence beside it": _share(r["verdict"] == "healthy" and not r["ending"] for r in healthy),
        }
    return rows


def later_there(programs: Sequence[Program], here: dict[str, Result], there: dict[str, Result]) -> str:
    """Return by how many steps the first alarm in a faulty run comes later on the device path, and where it differs at all."""
    runs = [f"{p.name}/faulty/{s}" for p in programs if p.twin is not None for s in SEEDS]
    pairs = [(_alarm(here[run], OURS), _alarm(there[run], OURS)) for run in runs]
    lags = [b - a for a, b in pairs if a is not None and b is not None]
    alone = sum((a is None) != (b is None) for a, b in pairs)
    late = sum(lag > 2 for lag in lags)
    return f"median {statistics.median(lags):g} steps, more than 2 in {late} of {len(lags)}; on one path alone {alone}"


def _found(program: Program, result: Result, detector: str) -> bool:
    alarm = _alarm(result, detector)
    return alarm is not None and alarm >= program.onset


def _before(program: Program, result: Result, detector: str) -> bool:
    alarm = _alarm(result, detector)
    return alarm is not None and program.onset <= alarm < result["diverged"]


def misses(programs: Sequence[Program], results: dict[str, Result]) -> list[str]:
    """Return a line for each program and kind of error that gradwatch made, with the seeds."""
    found: dict[tuple[str, str], tuple[list[int], str]] = {}
    for program in programs:
        for seed in SEEDS:
            for which in ("faulty", "twin") if program.twin is not None else ("healthy",):
                where = f"{program.name} ({program.family}{', the twin' if which == 'twin' else ''})"
                for what, detail in _errors(program, which, seed, results[f"{program.name}/{which}/{seed}"]):
                    found.setdefault((where, what), ([], detail))[0].append(seed)
    lines = []
    for (where, what), (seeds, detail) in found.items():
        of = "each seed" if len(seeds) == len(SEEDS) else f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        lines.append(f"{where}, {of}: {what}{detail}")
    return lines


def _errors(program: Program, which: str, seed: int, result: Result) -> Iterator[tuple[str, str]]:
    """Yield each error in one run, and its detail."""
    well = which != "faulty" or within_reach(program.name, seed, result["final"])
    if which != "faulty" and result["verdict"] != "healthy":
        yield "last word", f": {result['verdict']}"
    if not well and result["verdict"] == "healthy":
        yield "last word", f": healthy, although the loss ends at {result['final']:.3g}"
    alarm = _alarm(result, OURS)
    told = (
        f" ({', '.join(f'{kind} at step {step}' for kind, step in result['notices'][:2])})" if result["notices"] else ""
    )
    if which != "faulty":
        if alarm is not None:
            yield "false alarm", f": {result['alarm']['kind']} at step {alarm}, by {', '.join(result['codes'])}"
        return
    if alarm is None:
        yield ("only a notice" if told else "missed"), told
        return
    kind, suspect = result["alarm"]["kind"], result["alarm"]["suspect"]
    if alarm < program.onset:
        yield "alarm before the cause", f", at step {alarm} of {program.onset}"
    symptoms = symptoms_of(program, result["growth"])
    if kind not in symptoms:
        yield f"called {kind}", f", expected {' or '.join(symptoms)}"
    if program.suspect and not (suspect or "").startswith(program.suspect):
        yield "wrong suspect", f": {suspect}, expected {program.suspect}"
    diverged = result["diverged"]
    if diverged is not None and diverged - program.onset >= _EARLY and alarm >= diverged:
        yield "late", f": alarm at step {alarm}, diverged at {diverged}"


def toy_rows(results: dict[str, Result]) -> list[list[str]]:
    """Return a row for each toy training: false alarms, or lead before NaN."""
    rows = []
    for toy in TOYS:
        runs = [results[f"toy {toy.name}/toy/{seed}"] for seed in range(toy.seeds)]
        alarms = [_alarm(run, OURS) for run in runs]
        if toy.onset is None:
            rows.append([toy.name, f"{sum(alarm is not None for alarm in alarms)} of {toy.seeds} with a false alarm"])
            continue
        leads = [
            run["nonfinite"] - alarm
            for run, alarm in zip(runs, alarms, strict=True)
            if alarm is not None and run["nonfinite"] is not None
        ]
        early = sum(alarm is not None and alarm < toy.onset for alarm in alarms)
        told = (
            f"lead before NaN {', '.join(map(str, leads))}"
            if leads
            else f"{sum(a is not None for a in alarms)} detected"
        )
        if leads:
            told += f" (median {statistics.median(leads):g})"
        rows.append([toy.name, told + (f"; {early} before the cause" if early else "")])
    return rows
