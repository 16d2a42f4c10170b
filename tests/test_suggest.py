"""What threshold a run's own norms suggest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gradwatch
from gradwatch.autoclip.suggest import suggest
from gradwatch.history.typical_norm import typical_norm
from tests.trainings import mlp, train

NORMS = arrays.arrays(np.float64, st.integers(16, 200), elements=st.floats(1e-6, 1e6))


@given(norms=NORMS)
@settings(max_examples=60, deadline=None)
def test_each_choice_counts_the_steps_that_it_would_have_clipped(
    norms: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> None:
    """By a plain loop; the suggestion is a choice, in the safe band, and rare unless none is."""
    found = suggest(norms)
    for choice in found.choices:
        assert choice.clipped == sum(1 for norm in norms.tolist() if norm > choice.threshold)
    typical = found.typical
    assert typical <= found.threshold <= 10 * typical * (1 + 1e-12)
    chosen = next(choice for choice in found.choices if choice.threshold == found.threshold)
    assert (
        chosen.clipped <= len(norms) / 100
        or found.threshold == found.choices[-1].threshold
        or found.threshold == 10 * typical
    )


@given(norms=NORMS, times=st.floats(1.5, 1000.0))
@settings(max_examples=30, deadline=None)
def test_norms_that_are_not_finite_change_nothing_but_their_count(
    norms: np.ndarray[tuple[int], np.dtype[np.float64]], times: float
) -> None:
    """Nor do zeros; and typical norms scale with the norms."""
    found = suggest(norms)
    spoiled = suggest(np.concatenate([[np.nan, 0.0], norms, [np.inf]]))
    assert dataclasses.replace(spoiled, nonfinite=0) == found
    assert spoiled.nonfinite == 2
    assert suggest(norms * times).typical == pytest.approx(times * found.typical)


def test_numbers_stand_as_in_other_sentences() -> None:
    """No exponent below a million."""
    said = str(suggest(np.array([0.5] * 60 + [8215.0])))
    assert "largest 8,215, over 61 steps" in said
    assert "e+" not in said


def test_a_run_that_is_too_young_is_told_what_is_missing() -> None:
    """The count, and what to do."""
    with pytest.raises(
        gradwatch.UsageError, match=r"after 3 steps with a finite norm; expected at least 16\. Train on"
    ):
        suggest(np.array([1.0, 2.0, np.nan, 3.0]))


def test_a_monitor_suggests_by_its_own_norms_and_reads_well() -> None:
    """A calm training: a threshold above all but the outliers, in a table that a terminal shows whole."""
    model = mlp()
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 60)
    found = monitor.suggest_clip()
    norms = monitor.history.global_norm()
    assert found.steps == 60
    assert found.typical == pytest.approx(typical_norm(norms))
    assert np.count_nonzero(norms > found.threshold) <= 1
    text = str(found)
    assert text.startswith("Clip the global norm at ")
    assert text.count("<- suggested") == 1
    assert "the customary default" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_typical_norm_is_the_one_that_auto_clip_goes_by() -> None:
    """Of a calm run it is the median, of one whose norms fell the newest."""
    norms = np.concatenate([np.full(500, 8.0), np.full(300, 0.5)])
    assert suggest(norms).typical == 0.5
    assert suggest(norms[:100]).typical == 8.0
