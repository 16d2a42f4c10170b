"""The benchmark of repairs measures what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch.optim import optimizer as torch_optimizer

from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS
from benchmarks.faults.toys import TOYS
from benchmarks.repair import BY_NAME, LABEL, share, within_reach, worse
from benchmarks.repairs import CLIPS, NORM, NOTHING, OLMO, OURS, RANDOM, Outcome, repaired

EARLY = next(toy for toy in TOYS if toy.name == "early")


def test_doing_nothing_is_the_unwatched_run() -> None:
    """The same losses to the bit, and a loss that is lost."""
    trace = Trace()
    run_program(EARLY.train, 0, 30, trace)
    outcome = Outcome(**repaired(NOTHING, EARLY.train, 0, 30))
    assert outcome.nonfinite == next(step for step, loss in enumerate(trace.losses) if not math.isfinite(loss))
    assert not outcome.ended_well
    assert outcome.touched == 0


@pytest.mark.parametrize("method", [*CLIPS, RANDOM, OLMO])
def test_each_method_leaves_nothing_behind(method: str) -> None:
    """Its steps are made, by lot the same twice, and its hooks are gone."""
    first = repaired(method, EARLY.train, 1, 20, "a lot")
    assert first["steps"] == 20
    if method in (OURS, RANDOM):
        assert repr(first) == repr(repaired(method, EARLY.train, 1, 20, "a lot"))
    assert not torch_optimizer._global_optimizer_pre_hooks
    if method in (OURS, NORM):
        assert Outcome(**first).ended_well
        assert first["touched"] > 0


def test_a_twin_is_within_reach_of_itself_and_a_lost_run_of_nothing() -> None:
    """Nor is a run that ends ten times its first loss."""
    for program in PROGRAMS:
        if program.twin is not None:
            twin = LABEL[program.name]["0"]["twin"]
            assert within_reach(program.name, 0, twin["final"])
            assert not within_reach(program.name, 0, math.nan)
            assert not within_reach(program.name, 0, math.inf)
            assert not within_reach(program.name, 0, abs(twin["final"]) + 10 * abs(twin["first"]))
    assert set(LABEL) == set(BY_NAME)


@pytest.mark.parametrize(
    ("final", "harmed"), [(0.5, False), (1.0, False), (1.04, False), (1.06, True), (math.nan, True)]
)
def test_harm_is_measured_against_the_unclipped_run(final: float, harmed: bool) -> None:
    """More than 5 % above it; a loss that is not finite is harm."""
    unclipped = Outcome(steps=10, final=1.0, nonfinite=None, stopped=None, finite=True)
    assert worse(replace(unclipped, final=final), unclipped, first=2.0, by=0.05) is harmed


def test_ending_well_asks_for_finite_parameters() -> None:
    """A stop is well with them, a loss that went NaN is not."""
    well = Outcome(steps=10, final=1.0, nonfinite=None, stopped=None, finite=True)
    assert well.ended_well
    assert replace(well, final=math.nan, stopped=7).ended_well
    assert not replace(well, final=math.nan).ended_well
    assert not replace(well, finite=False).ended_well
    assert share([True, False]) == "50 % (1/2)"
