"""Numbers in sentences."""

from __future__ import annotations

import math

import pytest

from gradwatch.records import ClipRecord
from gradwatch.text.wording import apart, counted, last_steps, number, ordinal, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.304, "2.3"),
        (-0.25, "-0.25"),
        (99.96, "100"),
        (123.4, "123"),
        (12_345.6, "12,346"),
        (999_999.0, "999,999"),
        (1e6, "1e6"),
        (2.5e38, "2.5e38"),
        (3.12e-7, "3.12e-7"),
        (0.00099999997, "0.001"),
        (math.nan, "NaN"),
        (math.inf, "infinity"),
        (-math.inf, "minus infinity"),
    ],
)
def test_a_number_has_three_digits_and_rarely_an_exponent(value: float, text: str) -> None:
    """NaN and infinity are words."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "limit"), [(20.0, 10.0), (1.0004, 1.0), (100.3, 100.0), (1e30, 1.0000001e30), (0.80001, 0.8)]
)
def test_a_value_above_its_limit_looks_larger(value: float, limit: float) -> None:
    """By as many digits as it takes."""
    one, other = apart(value, limit)
    assert one != other
    assert abs(float(one.replace(",", "")) / value - 1) < 0.005


def test_one_is_singular_and_all_others_plural() -> None:
    """Zero too."""
    assert [counted(n, "step") for n in (0, 1, 2, 1500)] == ["0 steps", "1 step", "2 steps", "1,500 steps"]


def test_steps_that_were_not_all_measured_are_called_so() -> None:
    """As with ``every=10``."""
    assert last_steps(100, 50, 149) == "last 100 steps"
    assert last_steps(100, 0, 990) == "last 100 measured steps"


def test_a_small_share_keeps_a_digit() -> None:
    """And a large one has none."""
    assert [percent(share) for share in (0.0, 0.004, 0.042, 0.34, 0.999, 1.0)] == [
        *("0 %", "0.4 %", "4.2 %", "34 %", "99 %", "100 %")
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (9, "9th"), (11, "11th"), (112, "112th"), (1021, "1,021st")]
)
def test_an_ordinal_ends_as_it_is_spoken(count: int, text: str) -> None:
    """Those from 11 to 19 end in th."""
    assert ordinal(count) == text


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, clipped=3, steps=9, norm_before=2713.0, norm_after=1.0),
            "2,713, clipped to 1;",
        ),
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, clipped=0, steps=9, norm_before=1.74, norm_after=1.74),
            "largest norm 1.74;",
        ),
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, skipped=1, steps=9, norm_before=99.0, norm_after=0.0),
            "99, of a step that was left",
        ),
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, clipped=1600, steps=1600, norm_before=99.0, norm_after=1.0),
            "clipped 1,600 of 1,600 steps;",
        ),
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, clipped=1, steps=1, norm_before=99.0, norm_after=1.0),
            "clipped 1 of 1 step;",
        ),
        (
            ClipRecord("ScaleToNorm(norm=9)", 7, clipped=0, scaled_up=2, steps=2, norm_before=3.0, norm_after=9.0),
            "clipped 0 of 2 steps, 2 scaled up; largest norm 3, scaled up to 9;",
        ),
        (
            ClipRecord("ClipNorm(max_norm=1)", 7, clipped=5, steps=9, norm_before=9.0, norm_after=4.0, loosened=True),
            "largest norm 9, clipped to 4 while the bound was loosened;",
        ),
    ],
)
def test_what_a_clip_left_of_the_largest_norm_is_said_only_if_it_changed_it(record: ClipRecord, told: str) -> None:
    """Without exponents."""
    assert told in str(record)
