"""Robust statistics against plain references."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.history.statistics import Typical, doubling, ignore_fp_warnings, median_and_mad

positive = st.floats(1e-30, 1e30)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_median_and_mad_agree_with_the_standard_library(values: list[float]) -> None:
    """The median and 1.4826 times the median distance from it."""
    middle, spread = median_and_mad(np.array(values))
    assert math.isclose(middle, statistics.median(values), abs_tol=1e-9)
    assert math.isclose(spread, 1.4826 * statistics.median(abs(v - middle) for v in values), rel_tol=1e-9, abs_tol=1e-6)


def test_values_that_are_not_finite_do_not_count() -> None:
    """NaN and Inf are left out; nothing finite gives NaN."""
    assert median_and_mad(np.array([1.0, math.nan, 3.0, math.inf, 2.0]))[0] == 2.0
    assert all(map(math.isnan, median_and_mad(np.array([math.nan]))))


@given(st.lists(positive, min_size=1, max_size=20))
def test_the_typical_size_lies_between_the_smallest_and_the_largest(values: list[float]) -> None:
    """An average of logs never leaves their range."""
    typical = Typical(1, half_life=16)
    for value in values:
        typical.update(np.array([value]))
    assert min(values) * (1 - 1e-9) <= typical.value[0] <= max(values) * (1 + 1e-9)


def test_one_wild_value_moves_the_typical_size_by_a_bounded_factor() -> None:
    """Winsorising: after 100 ones, 1e30 moves it by less than ten per cent; NaN, Inf and zero not at all."""
    typical = Typical(2, half_life=64)
    for _ in range(100):
        typical.update(np.ones(2))
    with ignore_fp_warnings():
        for wild in (math.nan, math.inf, 0.0):
            typical.update(np.array([wild, 1.0]))
    assert typical.value.tolist() == [1.0, 1.0]
    typical.update(np.array([1e30, 1.0]))
    assert 1.0 < typical.value[0] < 1.1
    assert typical.value[1] == 1.0


def test_a_lasting_change_of_level_is_followed() -> None:
    """A new level ten times higher is typical after some 400 steps at it."""
    typical = Typical(1, half_life=64)
    for value in [1.0] * 200 + [10.0] * 400:
        typical.update(np.array([value]))
    assert 8.0 < typical.value[0] <= 10.0


def test_the_state_survives_a_round_trip() -> None:
    """A resumed baseline goes on as if nothing had happened."""
    one, other = Typical(3, 64), Typical(3, 64)
    one.update(np.array([1.0, 2.0, math.nan]))
    other.load_state_dict(one.state_dict())
    for typical in (one, other):
        typical.update(np.array([3.0, 3.0, 3.0]))
    np.testing.assert_array_equal(one.value, other.value)


@pytest.mark.parametrize("wild", [None, np.nan, np.inf, 0.0, 1e6])
def test_many_rows_at_once_are_learned_as_one_by_one(wild: float | None) -> None:
    """The closed form, and its way back to the loop where a value is missing or clamped."""
    generator = np.random.default_rng(0)
    together, one_by_one = Typical(5, half_life=16), Typical(5, half_life=16)
    for block in range(30):
        rows = np.exp(generator.normal(scale=0.3, size=(generator.integers(1, 17), 5)))
        if wild is not None and block % 7 == 3:
            rows[0, 2] = wild
        with ignore_fp_warnings():
            together.update_all(rows)
            for row in rows:
                one_by_one.update(row)
        np.testing.assert_allclose(together.value, one_by_one.value, rtol=1e-12)
        np.testing.assert_allclose(together.scatter, one_by_one.scatter, rtol=1e-10)
        assert together.seen.tolist() == one_by_one.seen.tolist()


@pytest.mark.parametrize("every", [0.5, 3.0, 40.0])
def test_doubling_is_the_slope_of_the_logarithms(every: float) -> None:
    """Against numpy's own fit; what is not finite is left out, and what does not grow never doubles."""
    steps = np.arange(8)
    values = 2 ** (steps / every) * np.exp(0.01 * np.random.default_rng(0).standard_normal(8))
    assert doubling(values) == pytest.approx(1 / np.polyfit(steps, np.log2(values), 1)[0])
    values[3] = np.nan
    assert doubling(values) == pytest.approx(1 / np.polyfit(np.delete(steps, 3), np.log2(np.delete(values, 3)), 1)[0])
    assert doubling(values[::-1]) == math.inf
    assert doubling(np.array([1.0, 2.0])) == math.inf
