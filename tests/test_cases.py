"""The notation for runs."""

from __future__ import annotations

import math

import pytest

from gradwatch.rules.notation import series


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1 2 3", [1, 2, 3]),
        ("0.5x3", [0.5] * 3),
        ("1*2x4", [1, 2, 4, 8]),
        ("1+0.5x3", [1, 1.5, 2]),
        ("2.3+-0.1x3", [2.3, 2.2, 2.1]),
        ("1e4*0.5x2", [1e4, 5e3]),
        ("inf -1", [math.inf, -1]),
    ],
)
def test_a_series_reads_as_written(text: str, values: list[float]) -> None:
    """Values, repeats, and series that grow by a factor or a step."""
    assert series(text) == pytest.approx(values)


def test_a_word_that_is_no_series_is_named() -> None:
    """The error shows the word and the notation."""
    with pytest.raises(ValueError, match="'1y3' is not a series"):
        series("1 1y3")
