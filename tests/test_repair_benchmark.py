"""The benchmark of repairs measures what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from benchmarks.faults.labels import BY_NAME, LABEL, within_reach
from benchmarks.faults.program import Trace, run_program
from benchmarks.faults.programs import PROGRAMS, halves
from benchmarks.faults.toys import TOYS
from benchmarks.harm.judging import RARE, check_watching, harmed, median_of, row_of, summary, told
from benchmarks.repair.judging import share, worse
from benchmarks.repair.methods import CLIPS, NORM, NOTHING, OLMO, OURS, OURS_BY_VALUE, RANDOM, WATCHED, repaired
from benchmarks.repair.nearby import moved
from benchmarks.repair.outcome import Outcome, bits_of

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


def judged(loss: float, metric: float | None) -> Outcome:
    """Return the run of a program that holds data out, whose loss was 1 before it learned."""
    return Outcome(10, loss, None, None, finite=True, unlearned=1.0, metric=metric)


def test_harm_to_a_rare_signal_is_that_of_loss_or_metric() -> None:
    """More than 5 % worse than the unwatched run's 0.1 and 0.9; what is not finite, or was stopped, is harm."""
    unwatched = judged(0.1, 0.9)
    assert harmed(judged(0.104, 0.86), unwatched) == []
    assert harmed(judged(0.05, 1.0), unwatched) == []
    assert harmed(judged(0.106, 0.9), unwatched) == ["loss"]
    assert harmed(judged(0.1, 0.85), unwatched) == ["metric"]
    assert harmed(judged(math.nan, math.nan), unwatched) == ["loss", "metric"]
    assert harmed(judged(0.1, None), unwatched) == ["metric"]


def test_a_loss_that_is_almost_nothing_may_move_by_a_thousandth_of_what_was_learned() -> None:
    """As 5 % of 2 %: a thousandth of the loss before learning."""
    assert harmed(judged(0.0009, 1.0), judged(1e-6, 1.0)) == []
    assert harmed(judged(0.0012, 1.0), judged(1e-6, 1.0)) == ["loss"]


def test_a_run_that_was_stopped_is_the_worst_of_the_five() -> None:
    """Three of five stopped: the program is lost; two of five: the middle one is the worst that arrived."""
    good, stopped = judged(0.1, 0.9), judged(0.01, None)
    assert harmed(median_of([good, good, stopped, stopped, stopped]), good) == ["loss", "metric"]
    assert harmed(median_of([good, good, good, stopped, stopped]), good) == []


def test_a_rare_signal_that_is_only_watched_is_the_unwatched_run() -> None:
    """Losses, weights and buffers to the bit, judged on the same data held out; a bit that differs is an error."""
    programs = [program for program in RARE if "priority" in program.name or "bags" in program.name]
    results = {
        ("fault", program.name, method, seed): Outcome(**repaired(method, program.faulty, seed, 30, program.name))
        for program in programs
        for method in (NOTHING, WATCHED, OURS)
        for seed in (0, 1)
    }
    check_watching(results, programs, 2)
    for program in programs:
        unwatched, watched, armed = (results["fault", program.name, m, 0] for m in (NOTHING, WATCHED, OURS))
        assert unwatched.bits != results["fault", program.name, NOTHING, 1].bits
        assert unwatched.metric is not None
        assert (unwatched.final, unwatched.metric) == (watched.final, watched.metric)
        assert unwatched.unlearned == armed.unlearned
        assert (armed.bits == unwatched.bits) == (armed.touched == 0)
    key = ("fault", programs[0].name, WATCHED, 1)
    results[key] = replace(results[key], bits="another")
    with pytest.raises(AssertionError, match=r"seeds \[1\]: watching changed"):
        check_watching(results, programs, 2)


def test_the_table_of_harm_counts_runs_and_judges_medians() -> None:
    """Three written runs of one program: clipped by norm one ends worse, by value all do, and two have an alarm."""
    program = RARE[0]
    written = {
        NOTHING: [judged(0.1, 0.9)] * 3,
        WATCHED: [judged(0.1, 0.9), *[replace(judged(0.1, 0.9), alarms=("exploding", "spike"))] * 2],
        OURS: [judged(0.1, 0.9), judged(0.1, 0.9), replace(judged(0.4, 0.9), touched=3)],
        OURS_BY_VALUE: [replace(judged(0.4, 0.2), touched=6)] * 3,
    }
    results = {
        ("fault", program.name, method, seed): run for method, runs in written.items() for seed, run in enumerate(runs)
    }
    assert row_of(results, program, ("norm", "value"), 3)[1:] == [
        halves()[program.name],
        "2 of 3",
        "10 %, 60 %",
        "0.1, 0.1, 0.4",
        f"0.900, 0.900, 0.200 {program.metric}",
        "no (1 of 3)",
        "loss and metric (3 of 3)",
    ]
    assert summary(results, [program], ("norm", "value"), 3) == [
        f"{halves()[program.name]} half: 2 of 3 runs with an alarm; by norm 0 of 1 programs worse, 1 of 3 runs touched; "
        "by value 1 of 1 programs worse, 3 of 3 runs touched"
    ]
    assert told(results, [program], 3) == [f"{program.name}, seed 1: exploding, and 1 more"]


def test_the_digest_of_a_run_tells_a_single_bit() -> None:
    """In a loss, in a weight and in a buffer."""
    model = nn.BatchNorm1d(3)
    losses = np.array([0.5, 0.25])
    before = bits_of(losses, model)
    assert before == bits_of(losses.copy(), model)
    assert before != bits_of(np.nextafter(losses, 1), model)
    model.running_mean[0] = torch.finfo(torch.float32).tiny  # type: ignore[index]
    changed = bits_of(losses, model)
    assert changed != before
    with torch.no_grad():
        model.weight[0] = torch.nextafter(model.weight[0], torch.tensor(2.0))
    assert bits_of(losses, model) != changed


def test_runs_a_millionth_apart_begin_so_and_are_the_same_each_time() -> None:
    """The weights are changed before gradwatch sees them, by as much for the same number."""
    begun: list[Tensor] = []

    class Looks:
        def watch(self, model: nn.Module) -> None:
            begun.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))

        def step(self, loss: float) -> None:
            pass

    program = BY_NAME["zero_grad forgotten"]
    for train in (program.faulty, moved(program.faulty, 1), moved(program.faulty, 1), moved(program.faulty, 2)):
        run_program(train, 0, 1, Looks())
    plain, one, again, other = begun
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    apart = ((one - plain) / plain).abs()[plain != 0]
    assert 1e-7 < float(apart.median()) < 2e-6
