"""The fault set is whole: every program has a half and labels, and its outcomes are what it stands there for."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.detect import wilson
from benchmarks.detectors import BASELINES
from benchmarks.faults.outcome import LABELS, SEEDS, Outcome, is_faulty, is_healthy, outcome_of
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS, halves

FOUND = json.loads(LABELS.read_text())
BY_NAME = {program.name: program for program in PROGRAMS}


def test_it_is_large_enough() -> None:
    """At least 48 faulty programs of 10 families, and 40 healthy ones."""
    faulty = [program for program in PROGRAMS if program.twin is not None]
    assert len(faulty) >= 48
    assert len({program.family for program in faulty}) >= 10
    assert len(PROGRAMS) - len(faulty) >= 40
    assert all(program.steps <= 400 for program in PROGRAMS)


def test_every_program_was_drawn_into_a_half() -> None:
    """Both of about the same size."""
    drawn = halves()
    assert set(drawn) == set(BY_NAME)
    assert abs(2 * sum(half == "development" for half in drawn.values()) - len(drawn)) <= 2


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_labels_say_by_outcome_what_a_program_is(program: object) -> None:
    """Over all seeds: the faulty run fails, its twin and the healthy ones stay finite."""
    name = program.name  # type: ignore[attr-defined]
    for seed in SEEDS:
        runs = {which: Outcome(**values) for which, values in FOUND[name][str(seed)].items()}
        if "faulty" in runs:
            assert is_faulty(runs["faulty"], runs["twin"])
        assert is_healthy(runs.get("twin") or runs["healthy"])


def test_a_program_run_again_has_the_outcome_of_its_label() -> None:
    """The labels belong to these programs."""
    program = BY_NAME["SGD rate too high from the start"]
    assert program.twin is not None
    for which, train in (("faulty", program.faulty), ("twin", program.twin)):
        trace = Trace()
        run_program(train, 0, program.steps, trace)
        again, label = outcome_of(trace, program.onset), Outcome(**FOUND[program.name]["0"][which])
        assert (again.diverged is None) == (label.diverged is None)
        assert again.first == pytest.approx(label.first, rel=1e-3)


def written(losses: list[float], norms: list[float]) -> Trace:
    """Return the trace of a run of one layer."""
    return Trace(["layer"], losses, [[norm] for norm in norms], [[1.0]] * len(norms), [[False]] * len(norms), [1.0])


@pytest.mark.parametrize(
    ("name", "norms", "alarm"),
    [
        ("not finite", [1.0] * 50 + [math.nan] * 5, 50),
        ("norm > 100", [1.0] * 50 + [101.0] * 5, 50),
        ("not finite, norm > 100, vanishing", [1.0] * 50 + [1e-8] * 5, 50),
        ("each layer > 1.0 for 5 steps", [0.5] * 50 + [1.5] * 5, 54),
        ("ZClip's trigger", [1.0, 1.1] * 25 + [5.0] * 5, 50),
        ("OLMo-core, 6 sigma", [1.0, 1.1] * 50 + [5.0] * 5, 100),
        ("TheDeepChecker's growth", [0.1] * 20 + [2.0**n for n in range(35)], None),
    ],
)
def test_the_baselines_fire_where_their_sources_say(name: str, norms: list[float], alarm: int | None) -> None:
    """On written norms beside a loss that falls."""
    losses = [1.0 * 0.99**step for step in range(len(norms))]
    found = BASELINES[name](written(losses, norms))
    assert found == alarm if alarm is not None else found is not None


def test_wilsons_interval_is_the_published_one() -> None:
    """Nine of ten: 0.596 to 0.982; none of twenty: 0 to 0.161."""
    assert wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson(0, 20) == pytest.approx((0.0, 0.161), abs=1e-3)
