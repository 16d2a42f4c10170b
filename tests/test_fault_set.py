"""The fault set is whole: every program has a half and labels, and its outcomes are what it stands there for."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.detect.detectors import BASELINES
from benchmarks.detect.scores import wilson
from benchmarks.faults.outcome import SEEDS, Outcome, has_learned, is_faulty, is_healthy, outcome_of
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import LABELS, PROGRAMS, halves

FOUND = json.loads(LABELS.read_text())
BY_NAME = {program.name: program for program in PROGRAMS}
RARE = [program for program in PROGRAMS if program.metric]


def test_it_is_large_enough() -> None:
    """At least 48 faulty programs of 10 families, and 40 healthy ones."""
    faulty = [program for program in PROGRAMS if program.twin is not None]
    assert len(faulty) >= 48
    assert len({program.family for program in faulty}) >= 10
    assert len(PROGRAMS) - len(faulty) >= 40
    assert all(program.steps <= 400 for program in PROGRAMS if not program.metric)


def test_signals_that_are_rare_stand_in_both_halves() -> None:
    """At least 16 healthy programs with a metric of their rare part, at most 3,000 steps long, as many in each half."""
    drawn = [halves()[program.name] for program in RARE]
    assert len(drawn) >= 16
    assert all(program.twin is None and program.steps <= 3000 for program in RARE)
    assert abs(2 * drawn.count("development") - len(drawn)) <= 1


def test_every_program_was_drawn_into_a_half() -> None:
    """Both of about the same size."""
    drawn = halves()
    assert set(drawn) == set(BY_NAME)
    assert abs(2 * sum(half == "development" for half in drawn.values()) - len(drawn)) <= 2


def test_programs_stand_in_the_order_of_their_labels() -> None:
    """Whatever file a program stands in: a new one comes last, and no table is shuffled by a move."""
    assert [program.name for program in PROGRAMS] == list(FOUND)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_labels_say_by_outcome_what_a_program_is(program: object) -> None:
    """Over all seeds: the faulty run fails, its twin and the healthy ones stay finite."""
    name = program.name  # type: ignore[attr-defined]
    for seed in SEEDS:
        runs = {which: Outcome(**values) for which, values in FOUND[name][str(seed)].items()}
        if "faulty" in runs:
            assert is_faulty(runs["faulty"], runs["twin"])
        assert is_healthy(runs.get("twin") or runs["healthy"])


def test_rare_signals_are_learned_unwatched() -> None:
    """On each seed, on data held out: the loss has halved, and the metric lies nearer to its best than to chance."""
    for program in RARE:
        for seed in SEEDS:
            outcome = Outcome(**FOUND[program.name][str(seed)]["healthy"])
            assert has_learned(outcome, program.chance), f"{program.name}, seed {seed}: {outcome}"


def test_having_learned_asks_for_both() -> None:
    """Half of the loss gone, and half of the way from chance to 1; nothing held out is nothing learned."""
    run = Outcome(1.0, 0.1, None, None, 1.0, unlearned=1.0, learned=0.4, metric=0.8)
    assert has_learned(run, chance=0.5)
    assert not has_learned(replace(run, learned=0.6), chance=0.5)
    assert not has_learned(replace(run, metric=0.7), chance=0.5)
    assert not has_learned(replace(run, learned=math.nan), chance=0.5)
    assert not has_learned(replace(run, metric=None), chance=0.5)


def test_judging_draws_nothing_of_the_run() -> None:
    """Asked twice it says the same; neither the lot of the run nor a gradient or a weight changes."""
    for program in RARE:
        trace = Trace()
        steps = 302 if program.name == "healthy: a new head and a new loss" else 4
        run = run_program(program.faulty, 0, steps, trace)
        lot, parameters = torch.get_rng_state(), trace._parameters
        kept = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in parameters]
        first = run.held_out()
        assert run.before is not None, program.name
        assert first is not None
        assert math.isfinite(first.loss)
        assert first.metric <= 1
        assert first == run.held_out(), program.name
        assert torch.equal(lot, torch.get_rng_state()), program.name
        for parameter, (weight, gradient) in zip(parameters, kept, strict=True):
            assert torch.equal(parameter, weight)
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(gradient, parameter.grad)  # type: ignore[arg-type]


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
