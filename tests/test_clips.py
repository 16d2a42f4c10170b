"""Each clip against torch's own functions, plain loops, and the properties that it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradwatch
from gradwatch.clips import CLIPS
from gradwatch.clips.base import OneFactor
from gradwatch.clips.layer_norm import LayerBounds
from gradwatch.clips.zscore import ZBound
from tests.clipping import gradients, lived, moment, norm, norms, step, unread, weights
from tests.trainings import mlp, train

MOMENTS = {name: moment(name) for name in CLIPS}
NAMES = pytest.mark.parametrize("name", CLIPS)
SEEDS = st.integers(0, 10_000)
POWERS = st.integers(-8, 34)  # of ten: from far below every bound to where the norm of float32 overflows


def as_parameters(tensors: list[Tensor]) -> list[nn.Parameter]:
    """Return parameters with these gradients."""
    parameters = []
    for tensor in tensors:
        parameter = nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor.clone()
        parameters.append(parameter)
    return parameters


def equal(mine: list[Tensor], theirs: list[nn.Parameter], rtol: float = 1e-6) -> None:
    """Assert that these gradients are those of the parameters."""
    for one, other in zip(mine, theirs, strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one, other.grad, rtol=rtol, atol=1e-9)


# Against torch.


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 7.0, 1000.0])
def test_clip_norm_equals_torchs(max_norm: float) -> None:
    """Same gradients within 1e-6, above and below the bound."""
    mine, theirs = gradients(0), as_parameters(gradients(0))
    coefficient = gradwatch.ClipNorm(max_norm).apply(step(mine))
    total = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert coefficient == pytest.approx(min(1.0, max_norm / (total.item() + 1e-6)), rel=1e-6)
    equal(mine, theirs)


@pytest.mark.parametrize("max_value", [0.1, 0.5, 100.0])
def test_clip_value_equals_torchs(max_value: float) -> None:
    """Same gradients exactly, and the coefficient is norm after over norm before."""
    mine, theirs = gradients(1), as_parameters(gradients(1))
    before = norm(mine)
    coefficient = gradwatch.ClipValue(max_value).apply(step(mine))
    nn.utils.clip_grad_value_(theirs, max_value)
    equal(mine, theirs, rtol=0)
    assert coefficient == pytest.approx(norm(mine) / before)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1000.0])
def test_clip_layer_norm_equals_torchs_on_each_parameter_alone(max_norm: float) -> None:
    """What Keras calls clipnorm."""
    mine, theirs = gradients(2), as_parameters(gradients(2))
    before = norm(mine)
    coefficient = gradwatch.ClipLayerNorm(max_norm).apply(step(mine))
    for parameter in theirs:
        nn.utils.clip_grad_norm_(parameter, max_norm)
    equal(mine, theirs)
    assert coefficient == pytest.approx(norm(mine) / before, rel=1e-6)


@pytest.mark.parametrize(("max_norm", "max_value"), [(1.0, 0.1), (1.0, 0.9), (100.0, 0.5)])
def test_norm_then_value_equals_torchs_two_one_after_the_other(max_norm: float, max_value: float) -> None:
    """Whichever of them bites."""
    mine, theirs = gradients(3), as_parameters(gradients(3))
    before = norm(mine)
    coefficient = gradwatch.ClipNormThenValue(max_norm, max_value).apply(step(mine))
    nn.utils.clip_grad_norm_(theirs, max_norm)
    nn.utils.clip_grad_value_(theirs, max_value)
    equal(mine, theirs)
    assert coefficient == pytest.approx(norm(mine) / before, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e3])
def test_scaling_makes_the_norm_what_it_shall_be(scale: float) -> None:
    """Larger or smaller before; torch has no such function, normalize of the flat vector is the nearest."""
    mine = gradients(4, scale)
    truth = 10 * nn.functional.normalize(torch.cat([g.flatten() for g in mine]), dim=0)
    before = norm(mine)
    assert gradwatch.ScaleToNorm().apply(step(mine)) == pytest.approx(10 / before)
    torch.testing.assert_close(torch.cat([g.flatten() for g in mine]), truth, rtol=1e-6, atol=1e-9)
    zero = [torch.zeros(3)]
    assert gradwatch.ScaleToNorm().apply(step(zero)) == 1.0
    assert not zero[0].any()


# Against plain loops.


def test_agc_equals_a_loop_over_units() -> None:
    """A row of a matrix, a filter, a bias as a whole; a unit at zero counts as 0.001."""
    mine, held = gradients(5), weights()
    truth = [g.double().clone() for g in mine]
    for gradient, weight in zip(truth, held, strict=True):
        units = range(len(gradient)) if gradient.dim() > 1 else [slice(None)]
        for unit in units:
            limit = 0.01 * max(weight[unit].double().norm().item(), 1e-3)
            size = gradient[unit].norm().item()
            if size > limit:
                gradient[unit] *= limit / size
    before = norm(mine)
    coefficient = gradwatch.ClipAGC().apply(step(mine, held))
    for one, other in zip(mine, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-12)
    assert coefficient == pytest.approx(norm(mine) / before)


@pytest.mark.parametrize("bounds", [{}, {"lstm.*": 0.5, "head.*": 2.0}])
def test_agc_of_many_units_on_a_device_is_that_on_the_cpu(bounds: dict[str, float]) -> None:
    """More than are taken together, with one bound or several, and in several dtypes."""
    shapes = ((3000, 2), (5,), (2500, 3, 1))
    held = [0.3 * torch.randn(shape) for shape in shapes]
    mine = [3 * torch.randn(shape) for shape in shapes]
    mine[2], held[2] = mine[2].bfloat16(), held[2].bfloat16()
    theirs = [gradient.clone() for gradient in mine]
    clip = gradwatch.ClipAGC(0.1, layers=bounds)
    coefficient = clip.apply(step(mine, held))
    assert coefficient < 1
    assert clip.apply_unread(replace(unread(theirs), parameters=held)).item() == pytest.approx(coefficient, rel=1e-4)
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other)


def run_of_norms(seed: int, steps: int = 180) -> np.ndarray[Any, Any]:
    """Return norms of three layers, shape (steps, 3), with spikes, a NaN, an Inf and a layer that begins late."""
    generator = np.random.default_rng(seed)
    rows = np.exp(0.3 * generator.normal(size=(steps, 3)))
    rows[60] *= 50
    rows[130] *= 1e6
    rows[[40, 140], 1] = [np.nan, np.inf]
    return rows


@pytest.mark.parametrize("percentile", [10.0, 90.0])
def test_percentile_equals_a_loop(percentile: float) -> None:
    """The percentile that numpy gives of all finite norms up to now."""
    rows = run_of_norms(0)
    past: list[float] = []
    for row, now in zip(rows, lived(rows, gradwatch.ClipPercentile(percentile))[1], strict=True):
        total = float(np.sqrt((row**2).sum()))
        past += [total] if math.isfinite(total) else []
        assert isinstance(now, gradwatch.ClipNorm)
        assert now.max_norm == pytest.approx(np.percentile(past, percentile))


def test_zscore_equals_a_loop() -> None:
    """Nothing in the warm-up, then outliers by the reciprocal rule; averages of what was left."""
    rows = run_of_norms(1)
    history, found = lived(rows, gradwatch.ClipZScore())
    first: list[float] = []
    mean = variance = math.nan
    bitten = 0
    for number, row in enumerate(rows):
        total = float(np.sqrt((row**2).sum()))
        left = history.clip_coefficient()[number]
        if not math.isfinite(total):
            assert left == 1.0
            continue
        if len(first) < 25:
            first.append(total)
            assert found[number] is None
            mean, variance = float(np.mean(first)), float(np.var(first))
            continue
        z = (total - mean) / (math.sqrt(variance) + 1e-6)
        expected = total if z <= 2.5 else min(total, mean + 2.5 / (z / 2.5) * math.sqrt(variance))
        assert left * total == pytest.approx(expected, rel=1e-5)
        bitten += z > 2.5
        mean = 0.97 * mean + 0.03 * left * total
        variance = 0.97 * variance + 0.03 * (left * total - mean) ** 2
    assert bitten >= 2


def test_adagc_equals_a_loop() -> None:
    """Global clip and smallest norm in the warm-up, then each layer by its average."""
    rows = run_of_norms(2)
    found = lived(rows, gradwatch.ClipAdaGC())[1]
    average = [math.inf] * 3
    for number, (row, now) in enumerate(zip(rows.tolist(), found, strict=True)):
        total = math.sqrt(sum(value**2 for value in row))
        if number < 100:
            assert isinstance(now, gradwatch.ClipNorm)
        else:
            assert isinstance(now, LayerBounds)
            assert now.bounds == pytest.approx([1.04 * value for value in average])
        if not math.isfinite(total):
            continue
        for layer, value in enumerate(row):
            if number < 100:
                average[layer] = min(average[layer], value * min(1.0, 1.0 / total))
            else:
                left = min(value, 1.04 * average[layer])
                average[layer] = 0.99 * average[layer] + 0.01 * left


def test_a_baseline_that_was_not_asked_for_long_has_missed_nothing() -> None:
    """Asked once at the end or after each row: the same averages, for the rows that the ring still has."""
    rows = run_of_norms(3)
    for clip in (gradwatch.ClipZScore(), gradwatch.ClipAdaGC()):
        history, _ = lived(rows)
        each, once = clip.baseline(), clip.baseline()
        for count in range(len(rows)):
            each.clip(history, count)
        now, then = each.clip(history, len(rows)), once.clip(history, len(rows))
        assert now is not None
        assert then is not None
        for one, other in zip(now.model_dump().values(), then.model_dump().values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)


def test_a_frozen_clip_serves_two_runs_that_know_nothing_of_each_other() -> None:
    """What is learned is the baseline's, not the clip's."""
    clip = gradwatch.ClipZScore()
    before = repr(clip)
    calm, wild = (lived(factor * run_of_norms(4), clip)[1][-1] for factor in (1.0, 1000.0))
    assert isinstance(calm, ZBound)
    assert isinstance(wild, ZBound)
    assert wild.mean > 100 * calm.mean
    assert repr(clip) == before


# Bounds by name.


def test_layers_have_bounds_of_their_own_by_pattern() -> None:
    """The first that matches counts; the others get the clip's own."""
    mine, theirs = gradients(6), as_parameters(gradients(6))
    gradwatch.ClipValue(0.5, layers={"*.bias": 0.1, "lstm.*": 2.0}).apply(step(mine))
    for parameter, bound in zip(theirs, (2.0, 0.1, 0.5), strict=True):
        nn.utils.clip_grad_value_(parameter, bound)
    equal(mine, theirs, rtol=0)
    mine, theirs = gradients(6), as_parameters(gradients(6))
    gradwatch.ClipLayerNorm(layers={"head.*": 100.0}).apply(step(mine))
    for parameter, bound in zip(theirs, (1.0, 1.0, 100.0), strict=True):
        nn.utils.clip_grad_norm_(parameter, bound)
    equal(mine, theirs)


def test_a_pattern_without_a_layer_is_refused_at_attach() -> None:
    """It is a slip, and nothing stays attached."""
    model = mlp()
    clip = gradwatch.ClipValue(5.0, layers={"0.*": 1.0, "lstm.*": 10.0})
    with pytest.raises(gradwatch.UsageError, match=r"bounds for 'lstm.\*', but no layer has such a name"):
        gradwatch.attach(model, clip=clip, report=None)
    assert str(clip) == "ClipValue(layers={'0.*': 1.0, 'lstm.*': 10.0}, max_value=5.0)"
    assert str(gradwatch.ClipValue(5.0)) == "ClipValue(max_value=5.0)"


def test_a_bound_by_name_must_be_a_bound() -> None:
    """Zero is named with its pattern."""
    with pytest.raises(gradwatch.UsageError, match=r"'head.\*': 0.0"):
        gradwatch.ClipLayerNorm(layers={"head.*": 0.0})


# What clips promise.


@NAMES
@given(seed=SEEDS, power=POWERS)
@settings(max_examples=8, deadline=None)
def test_nothing_is_longer_than_its_bound(name: str, seed: int, power: int) -> None:
    """Global norm, layer norm, element, unit: whatever the clip bounds, also where float32 norms overflow."""
    clip, mine = MOMENTS[name], gradients(seed, 10.0**power)
    before = norm(mine)
    coefficient = clip.apply(step(mine))
    assert coefficient == pytest.approx(norm(mine) / before, rel=1e-5, abs=1e-37)
    slack = 1 + 1e-5
    if name in ("norm", "norm then value", "percentile", "scale"):
        bound = getattr(clip, "max_norm", 1.0)
        assert norm(mine) <= bound * slack
        if name == "scale":
            assert norm(mine) == pytest.approx(1.0, rel=1e-5)
    if name in ("value", "norm then value"):
        assert max(g.abs().max().item() for g in mine) <= 0.5 * slack
    if name in ("layer norm", "adagc"):
        limits = clip.bounds.tolist() if isinstance(clip, LayerBounds) else [1.0] * 3
        assert all(size <= limit * slack for size, limit in zip(norms(mine), limits, strict=True))
    if name == "agc":
        for gradient, weight in zip(mine, weights(), strict=True):
            rows = gradient.flatten(1) if gradient.dim() > 1 else gradient[None]
            held = weight.flatten(1) if weight.dim() > 1 else weight[None]
            assert (rows.double().norm(dim=1) <= 0.01 * held.double().norm(dim=1).clamp(min=1e-3) * slack).all()
    if isinstance(clip, ZBound):
        assert norm(mine) <= max(clip.mean + 2.5 * clip.deviation, 0) * slack + 1e-5


@NAMES
@given(seed=SEEDS, power=POWERS)
@settings(max_examples=8, deadline=None)
def test_the_direction_is_kept_where_that_is_promised(name: str, seed: int, power: int) -> None:
    """One factor for all elements; layer by layer where each layer has its own; the sign everywhere."""
    clip, mine = MOMENTS[name], gradients(seed, 10.0**power)
    before = [g.double().clone() for g in mine]
    clip.apply(step(mine))
    after = [g.double() for g in mine]
    assert all((one * other >= 0).all() for one, other in zip(before, after, strict=True))
    if isinstance(clip, OneFactor):
        before, after = ([torch.cat([g.flatten() for g in which])] for which in (before, after))
    if isinstance(clip, OneFactor) or name in ("layer norm", "adagc"):
        for one, other in zip(before, after, strict=True):
            cosine = (one / one.norm()).flatten() @ (other / other.norm()).flatten()
            assert cosine.item() == pytest.approx(1.0, abs=1e-6)


@NAMES
@given(seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_below_its_bound_a_gradient_is_left_alone(name: str, seed: int) -> None:
    """To the bit, and the coefficient is 1; only scaling always scales."""
    mine = gradients(seed, 1e-6)
    before = [g.clone() for g in mine]
    coefficient = MOMENTS[name].apply(step(mine))
    same = all(torch.equal(one, other) for one, other in zip(mine, before, strict=True))
    assert same is (name != "scale")
    assert coefficient == pytest.approx(1.0 if same else 1.0 / norm(before))


@NAMES
@given(seed=SEEDS, power=st.integers(-3, 6))
@settings(max_examples=8, deadline=None)
def test_clipping_twice_is_clipping_once(name: str, seed: int, power: int) -> None:
    """But by z-score: what it leaves of an outlier is below the threshold, so nothing happens the second time either."""
    clip, mine = MOMENTS[name], gradients(seed, 10.0**power)
    clip.apply(step(mine))
    once = [g.clone() for g in mine]
    clip.apply(step(mine))
    for one, other in zip(mine, once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-12)


@NAMES
@given(seed=SEEDS, bad=st.sampled_from([math.nan, math.inf, -math.inf]), device=st.booleans())
@settings(max_examples=8, deadline=None)
def test_what_is_not_finite_never_spreads(name: str, seed: int, bad: float, device: bool) -> None:
    """One bad element: all others keep their value to the bit, on the host as on a device."""
    mine = gradients(seed)
    mine[1][3] = bad
    before = [g.clone() for g in mine]
    coefficient = MOMENTS[name].apply_unread(unread(mine)).item() if device else MOMENTS[name].apply(step(mine))
    assert coefficient == 1.0
    for one, other in zip(mine, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@NAMES
def test_what_is_not_finite_is_told_and_enters_no_baseline(name: str) -> None:
    """It opens an incident, the step is skipped, and the clip acts on the steps after it as if it had not been."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    policy = gradwatch.AutoClip(name, when="always")

    def spoil(number: int) -> None:
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        if number == 30:
            weight.grad[0, 0] = math.nan
        if number == 40:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1e6)

    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        train(model, optimizer, 45, each=spoil)
    first = monitor.incidents[0].signs[0]
    assert (first.code, first.step) == ("GW302", 30)
    coefficients = monitor.history.clip_coefficient()
    assert np.flatnonzero(monitor.history.skipped()).tolist() == [30]
    assert coefficients[30] == 1.0
    assert coefficients[40] < 1e-2


@NAMES
@given(seed=SEEDS, power=st.integers(-6, 30), scale=st.sampled_from([1.0, 1024.0]))
@settings(max_examples=8, deadline=None)
def test_on_a_device_the_same_happens(name: str, seed: int, power: int, scale: float) -> None:
    """The same gradients, loss scale and all, and the same coefficient; nothing where it shall not fire."""
    clip = MOMENTS[name]
    mine, theirs, left = (gradients(seed, scale * 10.0**power) for _ in range(3))
    coefficient = clip.apply(step(mine, scale=scale))
    assert clip.apply_unread(unread(theirs, scale)).item() == pytest.approx(coefficient, rel=1e-5, abs=1e-37)
    assert clip.apply_unread(unread(left, scale, fires=False)).item() == 1.0
    untouched = gradients(seed, scale * 10.0**power)
    for one, other, same, whole in zip(mine, theirs, left, untouched, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=scale * 1e-9)
        assert torch.equal(same, whole)


@NAMES
def test_sparse_and_complex_gradients_end_as_their_dense_twins(name: str) -> None:
    """A sparse gradient with an index twice; complex ones by their real and imaginary parts."""
    clip, weight = MOMENTS[name], torch.randn(5, 4)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.full((3, 4), 5.0), (5, 4), check_invariants=True)
    dense = sparse.to_dense()
    one = clip.apply(step([sparse], [weight]))
    assert clip.apply(step([dense], [weight])) == pytest.approx(one)
    torch.testing.assert_close(sparse.to_dense(), dense)
    wave = torch.tensor([[3 + 4j, 0.1j], [1.0 - 2j, 0.3]])
    pairs = torch.view_as_real(wave).clone()
    held = torch.randn(2, 2, dtype=torch.complex64)
    clip.apply(step([wave], [held]))
    clip.apply(step([pairs], [torch.view_as_real(held)]))
    torch.testing.assert_close(torch.view_as_real(wave), pairs)


@NAMES
def test_every_precision_is_clipped(name: str) -> None:
    """Within what the precision holds."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        held = [w.to(dtype) for w in weights()]
        mine, truth = [g.to(dtype) for g in gradients(8)], [g.to(dtype).float() for g in gradients(8)]
        coefficient = MOMENTS[name].apply(step(mine, held))
        assert MOMENTS[name].apply(step(truth, [w.float() for w in held])) == pytest.approx(coefficient, rel=1e-2)
        for one, other in zip(mine, truth, strict=True):
            assert one.dtype is dtype
            torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=1e-5)


@NAMES
@given(seed=SEEDS, factor=st.floats(1.0, 100.0))
@settings(max_examples=8, deadline=None)
def test_a_loosened_clip_lets_more_through(name: str, seed: int, factor: float) -> None:
    """By the factor where the clip bites by norm alone; never less."""
    clip, mine, theirs = MOMENTS[name], gradients(seed, 1e4), gradients(seed, 1e4)
    tight, wide = clip.apply(step(mine)), clip.loosened(factor).apply(step(theirs))
    if name in ("norm", "layer norm", "scale", "percentile", "adagc", "norm then value"):
        assert wide == pytest.approx(factor * tight, rel=1e-3)
    assert wide >= tight * (1 - 1e-6)


@NAMES
def test_a_bound_that_makes_no_sense_is_refused_with_its_value(name: str) -> None:
    """Zero, negative, NaN, infinite, not a number."""
    for bad in (0, -1, math.nan, math.inf, "wide"):
        with pytest.raises(gradwatch.UsageError, match=rf"{CLIPS[name].__name__}\(\w+={bad!r}\)"):
            CLIPS[name](bad)  # type: ignore[call-arg]


def test_a_clip_from_history_has_no_bound_of_its_own() -> None:
    """It says where to get one."""
    with pytest.raises(gradwatch.UsageError, match="has no bound without a history"):
        gradwatch.ClipPercentile().apply(step(gradients(0)))


@NAMES
def test_each_can_be_had_from_the_top_and_by_name(name: str) -> None:
    """With its telemetry, in a training."""
    assert getattr(gradwatch, CLIPS[name].__name__) is CLIPS[name]
    model = mlp()

    def surge(number: int) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1e4 if number == 35 else 1)

    with gradwatch.attach(model, clip=gradwatch.AutoClip(name, when="always"), report=None, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=1e-4), 40, each=surge)
    assert np.isfinite(monitor.history.clip_coefficient()).all()
    assert monitor.history.clip_coefficient()[35] < 0.1
