"""What became of a run: the labels of the fault set, by outcome and never by intent.

``python -m benchmarks.faults.outcome`` runs every program without labels unwatched over three seeds and writes
``labels.json``; without that file it runs them all.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import track

from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import LABELS, PROGRAMS

if TYPE_CHECKING:
    from benchmarks.faults.program import Program

SEEDS = (0, 1, 2)
_GROWN = 10.0  # times the first weight norm: exploded, in the pilot study of the project's notes on detection
_ALWAYS = ("nonfinite", "diverged")  # written down also where there is none
_FAR = 10.0  # times the level before the cause: diverged


@dataclass(frozen=True)
class Outcome:
    """One run's end.

    Args:
        first: the first loss.
        final: the median of the last tenth of the losses.
        nonfinite: the first step whose loss is not finite.
        diverged: the first step whose loss is not finite or ten times its level before the cause.
        growth: the largest norm of all weights together over the first one, finite ones only; 1 where it is 0.
        unlearned: the loss on data held out before it was learned from, for a program that holds some out.
        learned: the same at the end.
        metric: the program's own measure at the end.
    """

    first: float
    final: float
    nonfinite: int | None
    diverged: int | None
    growth: float
    unlearned: float | None = None
    learned: float | None = None
    metric: float | None = None


def outcome_of(trace: Trace, onset: int) -> Outcome:
    """Judge a run by its losses."""
    losses = np.array(trace.losses)
    bad = ~np.isfinite(losses)
    level = float(np.median(losses[max(0, onset - 20) : onset])) if onset else float(losses[0])
    with np.errstate(invalid="ignore"):
        far = bad | (np.abs(losses) > _FAR * max(abs(level), 1e-3))
    far[:onset] = False
    weights = np.linalg.norm(np.array(trace.weight_norm), axis=1)
    first = float(np.linalg.norm(trace.first_weight_norm))
    weights = weights / first if first > 0 else np.ones(len(weights))
    return Outcome(
        first=float(losses[0]),
        final=float(np.median(losses[-max(1, len(losses) // 10) :])),
        nonfinite=_first(bad),
        diverged=_first(far),
        growth=float(np.max(weights, where=np.isfinite(weights), initial=0.0)),
    )


def symptoms_of(program: Program, growth: float) -> tuple[str, ...]:
    """Return the incident kinds that name what is to be seen: the program's, and explosion where weights grow tenfold."""
    return (*program.symptoms, "exploding") if growth >= _GROWN else program.symptoms


def _first(hits: object) -> int | None:
    found = np.flatnonzero(np.asarray(hits))
    return int(found[0]) if found.size else None


def is_faulty(faulty: Outcome, twin: Outcome) -> bool:
    """True when the faulty run ends worse than its twin by half, or did not stay finite, or diverged."""
    if faulty.diverged is not None or not math.isfinite(faulty.final):
        return True
    return faulty.final - twin.final > 0.5 * max(abs(twin.final), 0.02 * abs(twin.first))


def is_healthy(run: Outcome) -> bool:
    """True when it stayed finite."""
    return run.nonfinite is None and math.isfinite(run.final)


def has_learned(run: Outcome, chance: float) -> bool:
    """True when the loss on data held out has halved and the metric lies nearer to its best than to chance."""
    if run.unlearned is None or run.learned is None or run.metric is None:
        return False
    return run.learned < 0.5 * run.unlearned and run.metric > (1 + chance) / 2


def _label(index: int, seed: int) -> tuple[str, int, dict[str, object]]:
    torch.set_num_threads(1)
    program = PROGRAMS[index]
    found: dict[str, object] = {}
    for name, train in (("faulty" if program.twin else "healthy", program.faulty), ("twin", program.twin)):
        if train is not None:
            trace = Trace()
            run = run_program(train, seed, program.steps, trace)
            outcome = outcome_of(trace, program.onset if name == "faulty" else 0)
            held_out = run.held_out()
            if run.before is not None and held_out is not None:
                outcome = replace(outcome, unlearned=run.before.loss, learned=held_out.loss, metric=held_out.metric)
            found[name] = {key: value for key, value in asdict(outcome).items() if value is not None or key in _ALWAYS}
    return program.name, seed, found


def main() -> None:
    """Run all and write the labels."""
    argparse.ArgumentParser(
        "python -m benchmarks.faults.outcome",
        description="Label the programs that have no labels, by what becomes of them.",
    ).parse_args()
    known = json.loads(LABELS.read_text()) if LABELS.exists() else {}
    labels: dict[str, dict[str, object]] = {program.name: known.get(program.name, {}) for program in PROGRAMS}
    missing = [index for index, program in enumerate(PROGRAMS) if program.name not in known]
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(_label, index, seed) for index in missing for seed in SEEDS]
        for job in track(as_completed(jobs), total=len(jobs), description="unwatched runs"):
            name, seed, found = job.result()
            labels[name][str(seed)] = found
    LABELS.write_text(
        json.dumps({name: dict(sorted(found.items())) for name, found in labels.items()}, indent=1) + "\n"
    )
    for program in (PROGRAMS[index] for index in missing):
        _check(program, labels[program.name])


def _check(program: Program, found: dict[str, object]) -> None:
    """Print programs whose outcome is not what they stand in the set for."""
    for seed, runs in found.items():
        assert isinstance(runs, dict)
        outcomes = {name: Outcome(**values) for name, values in runs.items()}
        if program.twin is not None and not is_faulty(outcomes["faulty"], outcomes["twin"]):
            print(f"{program.name}, seed {seed}: not faulty by outcome: {outcomes}")
        healthy = outcomes.get("twin") or outcomes["healthy"]
        if not is_healthy(healthy):
            print(f"{program.name}, seed {seed}: the healthy run is not: {healthy}")
        if program.metric and not has_learned(healthy, program.chance):
            print(f"{program.name}, seed {seed}: has not learned: {healthy}")


if __name__ == "__main__":
    main()
