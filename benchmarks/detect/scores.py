"""What is found, what is not, and what is found where there is nothing: ``python -m benchmarks.detect``.

Every program of the fault set is run over three seeds, the faulty one, its repaired twin and the healthy ones alike, watched
by gradwatch with its defaults; the untuned detectors of `detectors.py` see the same run's recorded numbers. Watching
changes no bit, so that one run serves them all. Finished runs are kept below ``build/`` until gradwatch or the fault set
changes, so that the command can be broken off and taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gradwatch
from benchmarks.detect.detectors import BASELINES
from benchmarks.faults.outcome import SEEDS, outcome_of, symptoms_of
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.faults.toys import STEPS, TOYS
from benchmarks.pages import ROOT, between_marks, markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from benchmarks.faults.program import Program

OURS = "gradwatch"
_EARLY = 5  # steps between cause and divergence from which a warning before it can be asked for
GOALS = {
    "recall, all faulty runs": "97 %",
    "healthy runs with a false alarm": "at most 1 %",
    "paired recall": "95 %",
    "alarm before divergence": "80 %",
    "first incident's kind is a measured symptom": "95 %",
    "prime suspect is the faulty layer": "90 %",
    "incidents in one faulty run": "median 1, at most 3",
}
Result = dict[str, Any]


class Watched(Trace):
    """A recorded run that gradwatch watches with its defaults."""

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        super().watch(model)
        self.monitor = gradwatch.attach(model, report=None, strict=True)
        self.alarm: dict[str, Any] | None = None

    def step(self, loss: float) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        super().step(loss)
        if self.alarm is None:
            grave = [incident for incident in self.monitor.incidents if incident.severity != "notice"]
            if grave:
                first = grave[0]
                self.alarm = {"step": len(self.losses) - 1, "kind": first.kind, "suspect": first.suspect}


def watched_run(train: Any, seed: int, steps: int, onset: int) -> Result:
    """Run once; return what gradwatch and the baselines said, and what became of it."""
    torch.set_num_threads(1)
    trace = Watched()
    run_program(train, seed, steps, trace)
    trace.monitor.detach()
    incidents = trace.monitor.incidents
    outcome = outcome_of(trace, onset)
    return {
        "alarm": trace.alarm,
        "grave": [[i.kind, i.opened_step, i.suspect] for i in incidents if i.severity != "notice"],
        "notices": [[i.kind, i.opened_step] for i in incidents if i.severity == "notice"],
        "codes": sorted({sign.code for i in incidents if i.severity != "notice" for sign in i.signs}),
        "baselines": {name: detect(trace) for name, detect in BASELINES.items()},
        "diverged": outcome.diverged,
        "nonfinite": outcome.nonfinite,
        "growth": outcome.growth,
    }


def _job(index: int, which: str, seed: int) -> Result:
    if index < 0:
        toy = TOYS[-index - 1]
        return watched_run(toy.train, seed, STEPS, toy.onset or 0)
    program = PROGRAMS[index]
    train = program.twin if which == "twin" else program.faulty
    return watched_run(train, seed, program.steps, program.onset if which == "faulty" else 0)


def _jobs(only: set[str]) -> list[tuple[str, tuple[int, str, int]]]:
    jobs = []
    for index, program in enumerate(PROGRAMS):
        if program.name in only:
            for which in ("faulty", "twin") if program.twin is not None else ("healthy",):
                jobs += [(f"{program.name}/{which}/{seed}", (index, which, seed)) for seed in SEEDS]
    for place, toy in enumerate(TOYS):
        jobs += [(f"toy {toy.name}/toy/{seed}", (-place - 1, "toy", seed)) for seed in range(toy.seeds)]
    return jobs


def _folder() -> Path:
    digest = hashlib.sha256()
    for place in ("gradwatch", "benchmarks/faults"):
        for path in sorted((ROOT / place).rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update((ROOT / "benchmarks" / "detect" / "detectors.py").read_bytes())
    return ROOT / "build" / "detect" / digest.hexdigest()[:12]


def run_all(only: set[str], console: Console) -> dict[str, Result]:
    """Run what is not there yet, on two processes; return all results by ``program/which/seed``."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    results, missing = {}, {}
    failed: dict[str, Exception] = {}
    for key, job in _jobs(only):
        path = folder / (hashlib.sha256(key.encode()).hexdigest()[:16] + ".json")
        if path.exists():
            results[key] = json.loads(path.read_text())
        else:
            missing[key] = job, path
    with ProcessPoolExecutor(2) as pool:
        running = {pool.submit(_job, *job): (key, path) for key, (job, path) in missing.items()}
        for done in track(as_completed(running), total=len(running), description="watched runs", console=console):
            key, path = running[done]
            try:
                results[key] = done.result()
            except Exception as error:  # the others' results shall be kept before this one ends the command
                failed[key] = error
                continue
            path.write_text(json.dumps(results[key]))
    for key, cause in failed.items():
        raise RuntimeError(f"{key} failed: {cause!r}") from cause
    return results


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
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
    """Return the rows of the table for one detector."""
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
    return rows


def _found(program: Program, result: Result, detector: str) -> bool:
    alarm = _alarm(result, detector)
    return alarm is not None and alarm >= program.onset


def _before(program: Program, result: Result, detector: str) -> bool:
    alarm = _alarm(result, detector)
    return alarm is not None and program.onset <= alarm < result["diverged"]


def misses(programs: Sequence[Program], results: dict[str, Result]) -> list[str]:
    """Return what gradwatch got wrong, a line for each program and kind of error, with the seeds."""
    found: dict[tuple[str, str], tuple[list[int], str]] = {}
    for program in programs:
        for seed in SEEDS:
            for which in ("faulty", "twin") if program.twin is not None else ("healthy",):
                where = f"{program.name} ({program.family}{', the twin' if which == 'twin' else ''})"
                for what, detail in _errors(program, which, results[f"{program.name}/{which}/{seed}"]):
                    found.setdefault((where, what), ([], detail))[0].append(seed)
    lines = []
    for (where, what), (seeds, detail) in found.items():
        of = "each seed" if len(seeds) == len(SEEDS) else f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        lines.append(f"{where}, {of}: {what}{detail}")
    return lines


def _errors(program: Program, which: str, result: Result) -> Iterator[tuple[str, str]]:
    """Yield what was wrong with one run, and the detail of it."""
    alarm = _alarm(result, OURS)
    told = (
        f" ({', '.join(f'{kind} at step {step}' for kind, step in result['notices'][:2])})" if result["notices"] else ""
    )
    if which != "faulty":
        if alarm is not None:
            yield "false alarm", f": {result['alarm']['kind']} at step {alarm}, by {', '.join(result['codes'])}"
        return
    if alarm is None:
        yield ("told as a notice only" if told else "missed"), told
        return
    kind, suspect = result["alarm"]["kind"], result["alarm"]["suspect"]
    if alarm < program.onset:
        yield "an alarm before the cause", f", at step {alarm} of {program.onset}"
    symptoms = symptoms_of(program, result["growth"])
    if kind not in symptoms:
        yield f"called {kind}", f", expected {' or '.join(symptoms)}"
    if program.suspect and not (suspect or "").startswith(program.suspect):
        yield "another suspect", f": {suspect}, expected {program.suspect}"
    diverged = result["diverged"]
    if diverged is not None and diverged - program.onset >= _EARLY and alarm >= diverged:
        yield "late", f": alarm at step {alarm}, diverged at {diverged}"


def toy_rows(results: dict[str, Result]) -> list[list[str]]:
    """Return the peers' toys, a row each: false alarms, or lead before NaN."""
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
            f"lead before NaN {', '.join(map(str, leads))}" if leads else f"{sum(a is not None for a in alarms)} told"
        )
        if leads:
            told += f" (median {statistics.median(leads):g})"
        rows.append([toy.name, told + (f"; {early} before the cause" if early else "")])
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Detection on the fault set, beside untuned detectors.")
    parser.add_argument("--half", choices=("development", "report", "both"), default="both")
    parser.add_argument("--misses", action="store_true", help="name what gradwatch got wrong")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/detection.md")
    options = parser.parse_args()
    console = Console()
    half_of = halves()
    chosen = ("development", "report") if options.half == "both" else (options.half,)
    programs = {half: [p for p in PROGRAMS if half_of[p.name] == half] for half in chosen}
    results = run_all({program.name for half in programs.values() for program in half}, console)
    texts = []
    for half, those in programs.items():
        faulty = sum(program.twin is not None for program in those)
        title = f"{half} half: {faulty} faulty programs with their twins, {len(those) - faulty} healthy ones, 3 seeds"
        ours = scores(those, results, OURS)
        table = Table(title=title, title_justify="left")
        for column in ("", OURS, *BASELINES):
            table.add_column(column)
        others = {name: scores(those, results, name) for name in BASELINES}
        for row, value in ours.items():
            table.add_row(row, value, *(others[name].get(row, "") for name in BASELINES))
        console.print(table)
        texts.append((half, title, ours, others))
        if options.misses:
            for line in misses(those, results):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    toys = toy_rows(results)
    for name, told in toys:
        console.print(f"{name}: {told}")
    if options.write:
        _write(texts, toys, misses([p for half in programs.values() for p in half], results))


def _write(
    texts: list[tuple[str, str, dict[str, str], dict[str, dict[str, str]]]], toys: list[list[str]], wrong: list[str]
) -> None:
    rows = [[row, GOALS[row], *(ours[row] for _, _, ours, _ in texts)] for row in texts[0][2]]
    first = markdown(["", "goal", *(f"{half} half" for half, *_ in texts)], rows)
    half, _, ours, others = texts[-1]
    four = [row for row in ours if row in next(iter(others.values()))]
    beside = [
        [name, *(found[row].partition(" (")[0] for row in four)] for name, found in ((OURS, ours), *others.items())
    ]
    second = f"Beside untuned detectors on the same runs, {half} half:\n\n" + markdown(["", *four], beside)
    third = "On the toy trainings on which other tools were tried:\n\n" + markdown(["", OURS], toys)
    between_marks(ROOT / "README.md", "detection", "\n\n".join((first, second, third)))
    parts = []
    for _, title, ours, others in texts:
        lines = [[name, *(found[row] for row in four)] for name, found in ((OURS, ours), *others.items())]
        parts.append(f"{title}:\n\n" + markdown(["", *four], lines))
    parts.append("The peers' toys:\n\n" + markdown(["", "gradwatch"], toys))
    parts.append("What gradwatch got wrong, by program:\n\n" + "\n".join(f"* {line}" for line in wrong))
    between_marks(ROOT / "docs" / "detection.md", "detection", "\n\n".join(parts))


if __name__ == "__main__":
    main()
