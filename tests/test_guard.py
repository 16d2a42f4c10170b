"""What auto-clip does beyond its clip, against loops over layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradwatch
from gradwatch.autoclip.guard import Guard
from gradwatch.autoclip.limits import AutoClipLimits
from gradwatch.clips.base import OneFactor
from gradwatch.history.history import History
from gradwatch.records import Floats, Provenance, Row
from tests import clipping
from tests.clipping import LAYERS, gradients, norms, step

CLIPS = [gradwatch.ClipNorm(0.7), gradwatch.ClipValue(0.1), gradwatch.ClipLayerNorm(0.5)]
NOBODY = np.full(len(LAYERS), np.nan)


def guard_of(loss: float, rates: list[float], family: str = "sgd", usual: Floats = NOBODY) -> Guard:
    """Return the guard of a run with one row of this loss."""
    history = History(LAYERS)
    provenance = Provenance("written", loss="backward root")
    history.push(Row(0, loss, np.ones(3), 1.7, rate=np.array(rates), family=family, provenance=provenance))  # type: ignore[arg-type]
    return Guard(usual, history.decrease_rates, history.reference_loss, 1.0, AutoClipLimits())


def guarded(guard: Guard, clip: gradwatch.Clip, tensors: list[torch.Tensor], loss: float, *, unread: bool) -> float:
    """Apply the guard around the clip, with norms on the host or as on a device; return the ratio."""
    made = clipping.unread(tensors) if unread else step(tensors)
    return float(guard.around(clip, made, torch.tensor(norms(tensors), dtype=torch.float64), loss))


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize(
    ("size", "loss", "family", "acts"),
    [(1.0, 1.0, "sgd", False), (9.0, 1.0, "adam", False), (9.0, -1.0, "sgd", False), (9.0, 1.0, "sgd", True)],
)
def test_a_step_that_promises_less_than_the_loss_is_left_alone(
    size: float, loss: float, family: str, acts: bool, unread: bool
) -> None:
    """So is one of an optimizer that does not step by rate times gradient, and one beside a negative loss."""
    before = [gradient * size / gradient.norm() for gradient in gradients(0)]
    after = [gradient.clone() for gradient in before]
    ratio = guarded(guard_of(loss, [0.3] * 3, family), gradwatch.ClipNorm(1e6), after, loss, unread=unread)
    assert (ratio < 1) == acts
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) != acts


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@settings(deadline=None)
@given(st.integers(0, 5), st.floats(1e-3, 1e3), st.floats(1e-3, 10.0))
def test_layers_of_one_rate_together_ask_for_no_more_than_the_loss_down_to_a_quarter(
    clip: gradwatch.Clip, unread: bool, seed: int, loss: float, rate: float
) -> None:
    """The last layer has a rate of its own, and answers for itself."""
    rates = [rate, rate, rate / 100]
    before = gradients(seed)
    plain, after = gradients(seed), gradients(seed)
    share = clip.apply(step(plain))
    left = guarded(guard_of(loss, rates), clip, after, loss, unread=unread)
    if isinstance(clip, OneFactor):
        assert left == pytest.approx(np.linalg.norm(norms(after)) / np.linalg.norm(norms(before)), rel=1e-4)
    if clip.looks_inside:  # it comes last, so that what it leaves is within its bounds
        assert max(float(one.abs().max()) for one in after) <= 0.1 * (1 + 1e-6)
        return
    for group in ([0, 1], [2]):
        promised = share * sum(rates[i] * norms(before)[i] ** 2 for i in group)
        factor = max(1 / 4, min(1.0, loss / promised))
        for i in group:
            assert norms(after)[i] == pytest.approx(factor * norms(plain)[i], rel=1e-4)


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("times", [4.0, 100.0])
def test_a_layer_far_above_its_usual_norm_while_others_are_not_is_brought_to_twice_that_first(
    times: float, unread: bool
) -> None:
    """From eight times what the median layer surges on; the others' gradients stay as they are."""
    before, after = gradients(3), gradients(3)
    usual = np.array(norms(before)) / [1.0, times, 1.0]
    guard = guard_of(math.inf, [0.1] * 3, usual=usual)
    ratio = guarded(guard, gradwatch.ClipNorm(1e6), after, math.inf, unread=unread)
    assert (ratio < 1) == (times > 8)
    expected = 2 * usual[1] if times > 8 else norms(before)[1]
    assert norms(after)[1] == pytest.approx(expected, rel=1e-5)
    assert [norms(after)[i] for i in (0, 2)] == pytest.approx([norms(before)[i] for i in (0, 2)], rel=1e-6)


@pytest.mark.parametrize("unread", [False, True])
def test_where_gradients_are_not_finite_the_clip_alone_decides(unread: bool) -> None:
    """And this one leaves them as they are."""
    before = gradients(1)
    before[0][0] = math.nan
    after = [gradient.clone() for gradient in before]
    assert guarded(guard_of(1.0, [1.0] * 3), gradwatch.ClipNorm(1.0), after, 1.0, unread=unread) == 1.0
    assert all(torch.equal(*pair) for pair in zip(before[1:], after[1:], strict=True))


@settings(deadline=None)
@given(st.integers(0, 20), st.floats(0.01, 100.0), st.sampled_from(CLIPS))
def test_the_same_is_done_on_a_device(seed: int, loss: float, clip: gradwatch.Clip) -> None:
    """One guard: the same gradients are left, whether their norms are numbers or tensors."""
    usual = np.array([0.1, 5.0, np.nan])
    host, there = gradients(seed), gradients(seed)
    guard = guard_of(loss, [0.1, 0.1, 0.2], usual=usual)
    ratios = [guarded(guard, clip, tensors, loss, unread=unread) for tensors, unread in ((host, False), (there, True))]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
    for one, other in zip(host, there, strict=True):
        torch.testing.assert_close(one, other)
