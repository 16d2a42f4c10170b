"""Processes that train together decide together, also where settings, clocks or failures are those of one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from gradwatch.autoclip.policy import AutoClip
from gradwatch.clips import ClipNorm
from gradwatch.distributed import agreement
from gradwatch.rules import GradientSurge
from tests.together import STEPS, SUDDEN
from tests.torchrun import played as played_by

Both = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """All scenes, played once in two processes."""
    first, second = played_by(tmp_path_factory, 2, "tests.together")
    return {name: (first[name], second[name]) for name in first}


def alike(both: Both, *names: str) -> None:
    """Assert that both processes went to the end, with the same parameters and whatever else is named."""
    first, second = both
    assert "raised" not in first | second
    for name in ("parameters", *names):
        assert first[name] == second[name], name


def both_say(both: Both, *words: str) -> None:
    """Assert that each process has a note with all these words."""
    for one in both:
        assert any(all(word in note for word in words) for note in one["notes"]), one["notes"]


# How often to measure.


def test_a_budget_is_kept_together_although_clocks_run_apart(played: dict[str, Both]) -> None:
    """The largest wish counts, from the next row on: rows at the same steps, fewer than steps."""
    both = played["a_budget_by_clocks_that_run_apart"]
    alike(both, "steps", "notes")
    assert np.diff(both[0]["steps"]).max() > 1
    assert both[0]["processes"] == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a_different_every", "every: rank 0 1, rank 1 3"),
        ("a_budget_in_one_process", "budget: rank 0 0.01, rank 1 None"),
    ],
)
def test_each_process_watches_alone_where_rows_come_at_different_steps(
    name: str, words: str, played: dict[str, Both]
) -> None:
    """Nobody waits, and both say what differs."""
    alike(played[name])
    both_say(played[name], words, "numbers are those of this process alone")
    assert [one["processes"] for one in played[name]] == [1, 1]


def test_an_incident_in_one_process_does_not_change_what_is_exchanged(played: dict[str, Both]) -> None:
    """It calls for each step to be measured: all do, once the next row has told them."""
    both = played["an_incident_in_one_process_while_each_third_step_is_measured"]
    alike(both, "steps")
    assert [len(one["incidents"]) for one in both] == [0, 1]
    gaps = np.diff(both[0]["steps"])
    assert gaps[0] == 3
    assert 1 in gaps


# Settings.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("an_auto_clip_in_one_process", ["clip: rank 0 ClipNorm(max_norm=1.0), rank 1 none"]),
        ("a_different_max_skips", ["max_skips: rank 0 3, rank 1 20"]),
        (
            "different_thresholds_and_sets_of_rules",
            ["rule GW301: rank 0 GradientSurge(limit=10.0", "rule MY001", "rank 1 none"],
        ),
    ],
)
def test_where_settings_differ_all_say_so_and_only_watch(name: str, words: list[str], played: dict[str, Both]) -> None:
    """By the same numbers; none stops alone, and none claims to have clipped or skipped."""
    both = played[name]
    alike(both, "steps", "skipped")
    both_say(both, *words, "auto-clip does not act")
    assert [one["processes"] for one in both] == [2, 2]
    assert len(both[0]["steps"]) == STEPS
    assert all(not one["clipped"] and not one["skipped"] for one in both)


def test_settings_without_a_text_of_their_own_make_no_difference(played: dict[str, Both]) -> None:
    """A set, a function and an object; auto-clip acts in both."""
    both = played["the_same_settings_with_texts_of_their_own"]
    alike(both, "steps", "notes", "clipped", "incidents")
    assert both[0]["notes"] == []
    assert both[0]["clipped"] > 0


def test_settings_are_compared_one_by_one() -> None:
    """Grouped by value; of an auto-clip that others lack its settings tell nothing more."""

    class Odd(BaseModel):
        things: Any = None

    rules = [GradientSurge(limit=20)]
    one = agreement.settings_of(rules, None, {"every": 1})
    clipped = agreement.settings_of(rules, AutoClip(ClipNorm(2.0)), {"every": 1})
    stricter = agreement.settings_of(rules, AutoClip(ClipNorm(2.0), hold=7), {"every": 1})
    assert agreement.differences([one, one], [0, 1]) == {}
    assert agreement.differences([one, clipped, one], [0, 4, 8]) == {
        "clip": "ranks 0, 8 none, rank 4 ClipNorm(max_norm=2.0)"
    }
    assert agreement.differences([clipped, stricter], [0, 1]) == {"hold": "rank 0 30, rank 1 7"}
    assert agreement.text(Odd(things={"b", "a"})) == "Odd(things={'a', 'b'})"
    assert agreement.text(Odd(things=object())) == agreement.text(Odd(things=object()))
    assert agreement.text("<f at 0x7f3a>") == "'<f>'"


# Failures in one process alone.


@pytest.mark.parametrize("path", ["", "_later"], ids=["cpu", "as on a device"])
class TestARuleOfTheUsersOwn:
    """On both paths."""

    def test_opens_an_incident_in_both(self, path: str, played: dict[str, Both]) -> None:
        """One row after it fired, when each knows that it failed nowhere; on a device eight rows after."""
        both = played[f"a_rule_that_does_not_fail{path}"]
        alike(both, "clipped", "incidents", "steps")
        assert both[0]["clipped"] > 0
        assert both[0]["incidents"][0][1] == SUDDEN + (8 if path else 1)

    @pytest.mark.parametrize("when", ["before", "as_it_fires", "while_it_clips"])
    def test_that_fails_in_one_process_is_switched_off_in_both(
        self, when: str, path: str, played: dict[str, Both]
    ) -> None:
        """At the same row, so that they decide alike, whenever it fails; both say so."""
        both = played[f"a_rule_that_fails_{when}{path}"]
        alike(both, "clipped", "incidents", "steps", "skipped")
        both_say(both, "rule MY001 mine failed")
        assert (both[0]["clipped"] > 0) == (when == "while_it_clips")

    def test_failed_clips_make_no_step(self, path: str, played: dict[str, Both]) -> None:
        """A clip that fails in one process after it changed the gradients: the step is left out in both.

        On a device this optimizer makes it with zeros, which changes nothing and is not called skipped.
        """
        both = played[f"a_clip_that_fails_in_one_process{path}"]
        alike(both)
        both_say(both, "measuring failed and is switched off")
        assert both[0]["skipped"] == ([] if path else [2])
        assert both[0]["parameters"] == played["a_clip_that_fails_in_one_process"][0]["parameters"]


def test_a_bound_that_fails_in_one_process_leaves_the_step_out_in_both(played: dict[str, Both]) -> None:
    """The other has clipped already."""
    both = played["a_clip_whose_bound_fails_in_one_process"]
    alike(both, "skipped", "steps")
    assert both[0]["skipped"] == [SUDDEN + 1]


def test_nobody_clips_alone_while_the_news_of_a_failure_is_on_its_way(played: dict[str, Both]) -> None:
    """On devices it takes eight steps."""
    both = played["gradwatch_fails_on_a_device_while_it_clips"]
    alike(both)
    assert both[0]["clipped"] > 0


def test_decisions_that_differ_all_the_same_are_noticed_at_the_next_row(played: dict[str, Both]) -> None:
    """A rule that looks at what one process alone knows: from then on none acts, and both say what to do."""
    both = played["a_rule_that_says_otherwise_in_one_process"]
    both_say(both, "auto-clip has decided differently on rank 1", "checkpoint")
    assert [one["clipped"] for one in both] == [0, 1]
    assert len(both[0]["steps"]) == len(both[1]["steps"]) == STEPS


def test_a_report_that_fails_is_one_process_s_own_business(played: dict[str, Both]) -> None:
    """Decisions stay the same, and only that process says so."""
    both = played["a_report_that_fails_in_one_process"]
    alike(both, "clipped", "incidents", "steps")
    assert both[0]["notes"] == []
    assert "FailingReport failed" in both[1]["notes"][0]


# Steps that a gradient scaler leaves out.


@pytest.mark.parametrize("path", ["", "_later"], ids=["cpu", "as on a device"])
def test_a_scaler_that_leaves_a_step_out_in_one_process_hangs_nobody(path: str, played: dict[str, Both]) -> None:
    """Both have a row of that step: what the one skips, the other does not make either."""
    both = played[f"a_scaler_that_leaves_a_step_out_in_one_process{path}"]
    assert "raised" not in both[0] | both[1]
    assert both[0]["steps"] == both[1]["steps"] == list(range(30))
    assert both[0]["skipped"] == [5, 6]


@pytest.mark.parametrize("path", ["", "_later"], ids=["cpu", "as on a device"])
def test_a_step_that_all_scalers_leave_out_is_no_row(path: str, played: dict[str, Both]) -> None:
    """As in one process."""
    both = played[f"a_scaler_that_leaves_a_step_out_in_all_processes{path}"]
    alike(both, "steps", "incidents")
    assert both[0]["steps"] == list(range(28))
    assert both[0]["incidents"] == []
