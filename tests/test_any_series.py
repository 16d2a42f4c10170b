"""Whatever numbers come: the host half neither raises nor hangs, says a bounded number of things, and is fair."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradwatch
from gradwatch.autoclip.decision import NOTHING
from gradwatch.autoclip.engine import AutoClipEngine
from gradwatch.autoclip.policy import AutoClip
from gradwatch.errors import TrainingUnstableError
from gradwatch.history.history import History
from gradwatch.pipeline import Pipeline
from gradwatch.records import Alarm, Facts, Incident, NonFinite, Provenance, Row
from gradwatch.reports.notes import Notes
from gradwatch.rules import RULES, default_rules
from gradwatch.rules.notation import Case
from gradwatch.verdict import VerdictSettings, incidents
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.records import Floats

STORIES = 1 + len({rule.kind for rule in RULES} - {"exploding", "spike", "nonfinite", "diverging"})
UNSCALED = {"GW203", "GW303", "GW405"}  # 1.0, the optimizer's rate and ln(C) are absolute by their meaning
anything = st.one_of(
    st.floats(min_value=0, allow_infinity=True),
    st.sampled_from([0.0, 1e-30, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e30, math.nan, math.inf]),
)
levels = st.lists(st.tuples(st.sampled_from([1e-3, 0.1, 1.0, 20.0, 1e3]), st.integers(1, 60)), min_size=1, max_size=8)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[float, list[float], list[float]]]:
    """A run of up to 240 steps and 3 layers: pieces of one value each, and single wild steps between them."""
    layers = draw(st.integers(1, 3))
    rows: list[tuple[float, list[float], list[float]]] = []
    for _ in range(draw(st.integers(1, 6))):
        one = (
            draw(st.one_of(anything, st.floats(-1e6, 1e6))),
            draw(st.lists(anything, min_size=layers, max_size=layers)),
            draw(st.lists(anything, min_size=layers, max_size=layers)),
        )
        rows += [one] * draw(st.sampled_from([1, 2, 7, 40]))
    return rows


def row_of(step: int, loss: float, grad: Floats, weight: Floats, family: str, rate: float = 0.01) -> Row:
    """Return the row that a training with these numbers would leave."""
    codes = np.where(np.isnan(grad), NonFinite.NAN, np.where(np.isinf(grad), NonFinite.INF, 0)).astype(np.uint8)
    with np.errstate(all="ignore"):
        norm = float(np.sqrt(np.square(grad).sum()))
    return Row(
        step=step,
        loss=loss,
        grad_norm=grad,
        global_norm=norm,
        weight_norm=weight,
        nonfinite=codes if codes.any() else None,
        nonfinite_weight=~np.isfinite(weight),
        poisoned=not math.isfinite(norm),
        rate=np.full(len(grad), rate),
        family=family,  # type: ignore[arg-type]
        dead_share=np.zeros(len(grad)),
        unchanged=np.zeros(len(grad)),
        provenance=Provenance(source="written", loss="written"),
    )


def judged(rows: Sequence[Row], layers: Sequence[str], policy: AutoClip | None = None, codes: set[str] | None = None,
           order: Sequence[int] | None = None) -> Pipeline:  # fmt: skip
    """Run rows through the whole host half; errors of its parts are raised."""
    history = History(layers)
    history.know(Facts(optimizer="SGD", family=rows[0].family))
    if order is not None:
        history.order = np.array(order)
    rules = [rule for rule in default_rules() if codes is None or rule.code in codes]
    pipeline = Pipeline(history, rules, AutoClipEngine(policy, history) if policy else None, [], Notes(strict=True))
    for row in rows:
        decision = pipeline.judge(row)
        if decision is not NOTHING:
            pipeline.done(row, decision, 0.5)
    return pipeline


@settings(max_examples=150, deadline=None)
@given(runs(), st.sampled_from(["sgd", "adam", "other"]))
def test_no_series_makes_the_pipeline_raise_or_say_more_than_a_bounded_number_of_things(
    run: list[tuple[float, list[float], list[float]]], family: str
) -> None:
    """Each story tells one incident at a time, and closes it only after a calm stretch."""
    layers = [f"layer{i}" for i in range(len(run[0][1]))]
    rows = [row_of(i, loss, np.array(g), np.array(w), family) for i, (loss, g, w) in enumerate(run)]
    pipeline = judged(rows, layers)
    assert len(pipeline.incidents.all) <= STORIES * (1 + len(rows) // VerdictSettings().calm_steps)
    quickest = 1 + min(rule.keep_steps for rule in default_rules())
    assert len(pipeline.changes) <= len(RULES) * len(layers) * 2 * (1 + len(rows) // quickest)
    assert all(len(incident.advice) <= 4 for incident in pipeline.incidents.all)


@settings(max_examples=100, deadline=None)
@given(runs(), st.sampled_from(["norm", "value"]))
def test_no_series_makes_auto_clip_raise_anything_but_its_documented_stop(
    run: list[tuple[float, list[float], list[float]]], clip: str
) -> None:
    """After the cap of skips, and then only."""
    layers = [f"layer{i}" for i in range(len(run[0][1]))]
    rows = [row_of(i, loss, np.array(g), np.array(w), "sgd") for i, (loss, g, w) in enumerate(run)]
    poisoned = max((sum(1 for _ in group) for group in streaks([row.poisoned for row in rows])), default=0)
    try:
        judged(rows, layers, AutoClip(clip, max_skips=5))
    except TrainingUnstableError:
        assert poisoned > 5
    else:
        assert poisoned <= 5


def streaks(flags: Sequence[bool]) -> list[list[bool]]:
    """Return the runs of True."""
    found: list[list[bool]] = [[]]
    for flag in flags:
        if flag:
            found[-1].append(flag)
        else:
            found.append([])
    return found


def jittered(pieces: list[tuple[float, int]], salt: int) -> Floats:
    """Return pieces of constant level with the scatter of a training, so that nothing lies on a limit to the bit."""
    values = np.concatenate([np.full(count, level) for level, count in pieces])
    return values * np.exp(0.2 * np.random.default_rng(salt).standard_normal(len(values)))


def told(alarms: Sequence[Alarm]) -> set[tuple[str, str | None, int, str]]:
    """Return alarms by code, layer, step and state."""
    return {(alarm.code, alarm.layer, alarm.step, alarm.state) for alarm in alarms}


def stories(incidents: Sequence[Incident]) -> list[tuple[object, ...]]:
    """Return incidents by what a user reads of them."""
    return [(i.kind, i.severity, i.verdict, i.opened_step, i.closed_step, i.suspect) for i in incidents]


@settings(max_examples=60, deadline=None)
@given(levels, levels, levels, st.integers(-20, 20))
def test_scaling_the_loss_by_any_constant_changes_no_verdict_of_scale_free_rules(
    loss: list[tuple[float, int]], one: list[tuple[float, int]], two: list[tuple[float, int]], power: int
) -> None:
    """Loss and gradients times a power of two; the weights stay."""
    first, second, third = jittered(loss, 0), jittered(one, 1), jittered(two, 2)
    count = min(len(first), len(second), len(third))
    weight = np.ones(2)
    scale = 2.0**power
    free = {rule.code for rule in RULES} - UNSCALED
    plain, scaled = (
        judged(
            [
                row_of(i, factor * first[i], factor * np.array([second[i], third[i]]), weight, "other")
                for i in range(count)
            ],
            ["a", "b"],
            codes=free,
        )
        for factor in (1.0, scale)
    )
    assert told(plain.changes) == told(scaled.changes)
    assert stories(plain.incidents.all) == stories(scaled.incidents.all)


@settings(max_examples=60, deadline=None)
@given(levels, levels, levels, levels, st.permutations(range(3)))
def test_the_order_of_layers_does_not_matter(
    loss: list[tuple[float, int]],
    one: list[tuple[float, int]],
    two: list[tuple[float, int]],
    three: list[tuple[float, int]],
    permutation: list[int],
) -> None:
    """The same columns in another order, with the same backward order, tell the same stories."""
    columns = [jittered(pieces, salt) for salt, pieces in enumerate((loss, one, two, three))]
    count = min(map(len, columns))
    losses, grads = columns[0][:count], np.array([column[:count] for column in columns[1:]]).T
    names, weight = ["a", "b", "c"], np.array([1.0, 2.0, 3.0])
    order = [2, 1, 0]
    plain, permuted = (
        judged(
            [row_of(i, losses[i], grads[i][list(places)], weight[list(places)], "sgd") for i in range(count)],
            [names[place] for place in places],
            order=[order[place] for place in places],
        )
        for places in (range(3), permutation)
    )
    assert told(plain.changes) == told(permuted.changes)
    assert stories(plain.incidents.all) == stories(permuted.incidents.all)


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**12])
def test_a_real_explosion_is_told_alike_whatever_its_loss_is_multiplied_by(scale: float) -> None:
    """Adam with a rate that doubles from step 60 on: the same weights, and losses that differ by the factor alone."""
    found = []
    for factor in (1.0, scale):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0)

        def double(step: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            if step >= 60:
                optimizer.param_groups[0]["lr"] *= 2

        rules = [rule for rule in default_rules() if rule.code not in UNSCALED]
        with gradwatch.attach(model, rules=rules, report=None, strict=True) as monitor:
            train(
                model,
                optimizer,
                80,
                each=double,
                loss_of=lambda out, y, factor=factor: factor * torch.nn.functional.mse_loss(out, y),  # type: ignore[misc]
            )
        found.append(monitor)
    assert found[0].incidents
    assert told(found[0].alarms) == told(found[1].alarms)
    assert stories(found[0].incidents) == stories(found[1].incidents)


def test_the_list_of_incidents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest closed ones are forgotten; those that are kept stay in order."""
    assert incidents._KEPT == 1000
    monkeypatch.setattr(incidents, "_KEPT", 100)
    case = Case("bad batches", None, grad="1x25 nan 1x25 " * 160, family="other")
    history, rows = case.rows()
    pipeline = Pipeline(history, default_rules(), None, [], Notes(strict=True))
    for row in rows:
        pipeline.judge(replace_sampling(row))
    kept = pipeline.incidents.all
    assert len(kept) == 100
    closed = [incident.number for incident in kept if not incident.open]
    assert closed == list(range(closed[0], closed[-1] + 1))
    assert closed[0] > 50
    assert [incident.opened_step for incident in kept] == sorted(incident.opened_step for incident in kept)


def replace_sampling(row: Row) -> Row:
    """Leave the sampled numbers out, as most rows do."""
    return row._replace(weight_norm=None, dead_share=None, unchanged=None)
