"""What auto-clip does beyond its clip, against loops over layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwatch
from gradwatch.autoclip.guard import Guard
from gradwatch.autoclip.limits import AutoClipLimits
from gradwatch.clips.base import OneFactor
from gradwatch.history.history import History
from gradwatch.records import Provenance, Row
from tests.clipping import LAYERS, gradients, norms, step

CLIPS = [gradwatch.ClipNorm(0.7), gradwatch.ClipValue(0.1), gradwatch.ClipLayerNorm(0.5)]
NOBODY = np.full(len(LAYERS), np.nan)


def seen(norms_: list[float], loss: float, rates: list[float], family: str = "sgd") -> tuple[Row, History]:
    """Return a history whose last row has these numbers."""
    row = Row(
        0,
        loss,
        np.array(norms_),
        float(np.linalg.norm(norms_)),
        rate=np.array(rates),
        family=family,  # type: ignore[arg-type]
        provenance=Provenance("written", loss="backward root"),
    )
    history = History(LAYERS)
    history.push(row)
    return row, history


def test_a_step_that_promises_less_than_the_loss_needs_no_guard() -> None:
    """Nor does one of an optimizer that does not step by rate times gradient, nor one beside a negative loss."""
    assert Guard.of(*seen([1.0, 1.0, 1.0], 1.0, [0.3] * 3), NOBODY, 1.0, AutoClipLimits()) is None
    assert Guard.of(*seen([9.0, 9.0, 9.0], 1.0, [0.3] * 3, "adam"), NOBODY, 1.0, AutoClipLimits()) is None
    assert Guard.of(*seen([9.0, 9.0, 9.0], -1.0, [0.3] * 3), NOBODY, 1.0, AutoClipLimits()) is None
    assert Guard.of(*seen([9.0, 9.0, 9.0], 1.0, [0.3] * 3), NOBODY, 1.0, AutoClipLimits()) is not None


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@given(st.integers(0, 5), st.floats(1e-3, 1e3), st.floats(1e-3, 10.0))
def test_layers_of_one_rate_together_ask_for_no_more_than_the_loss_down_to_a_quarter(
    clip: gradwatch.Clip, seed: int, loss: float, rate: float
) -> None:
    """The last layer has a rate of its own, and answers for itself."""
    rates = [rate, rate, rate / 100]
    before = gradients(seed)
    guard = Guard.of(*seen(norms(before), loss, rates), NOBODY, 1.0, AutoClipLimits())
    plain, guarded = gradients(seed), gradients(seed)
    share = clip.apply(step(plain))
    if guard is None:
        assert sum(r * n**2 for r, n in zip(rates, norms(before), strict=True)) <= loss * (1 + 1e-9)
        return
    left = guard.around(clip, step(guarded))
    if isinstance(clip, OneFactor):
        assert left == pytest.approx(np.linalg.norm(norms(guarded)) / np.linalg.norm(norms(before)), rel=1e-4)
    if clip.looks_inside:  # it comes last, so that what it leaves is within its bounds
        assert max(float(one.abs().max()) for one in guarded) <= 0.1 * (1 + 1e-6)
        return
    for group in ([0, 1], [2]):
        promised = share * sum(rates[i] * norms(before)[i] ** 2 for i in group)
        factor = max(1 / 4, min(1.0, loss / promised))
        for i in group:
            assert norms(guarded)[i] == pytest.approx(factor * norms(plain)[i], rel=1e-4)


@pytest.mark.parametrize("times", [4.0, 100.0])
def test_a_layer_far_above_its_usual_norm_while_others_are_not_is_brought_to_twice_that_first(times: float) -> None:
    """From eight times what the median layer surges on; the others' gradients stay as they are."""
    before, after = gradients(3), gradients(3)
    usual = np.array(norms(before)) / [1.0, times, 1.0]
    guard = Guard.of(*seen(norms(before), math.inf, [0.1] * 3), usual, 1.0, AutoClipLimits())
    if times < 8:
        assert guard is None
        return
    assert guard is not None
    guard.around(gradwatch.ClipNorm(1e6), step(after))
    assert norms(after)[1] == pytest.approx(2 * usual[1], rel=1e-5)
    assert [norms(after)[i] for i in (0, 2)] == pytest.approx([norms(before)[i] for i in (0, 2)], rel=1e-6)


def test_where_gradients_are_not_finite_the_clip_alone_decides() -> None:
    """And this one leaves them as they are."""
    before = gradients(1)
    before[0][0] = math.nan
    row, history = seen([math.nan, 9.0, 9.0], 1.0, [1.0] * 3)
    guard = Guard.of(row, history, NOBODY, 1.0, AutoClipLimits())
    assert guard is not None
    assert guard.around(gradwatch.ClipNorm(1.0), step(before)) == 1.0
