"""Pending, firing, resolved: time in one place."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.history import History
from gradwatch.records import Floats, Kind, Row, Sign
from gradwatch.rules import Rule
from gradwatch.rules.notation import series
from gradwatch.verdict.alarms import Alarms


class Size(Rule):
    """A gradient norm, as it is."""

    code: ClassVar[str] = "XX001"
    name: ClassVar[str] = "size"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    limit: float = Field(default=10.0)

    def measure(self, history: History) -> Floats:
        """Return the norms."""
        return history.row.grad_norm


def states(text: str, **settings: float) -> list[tuple[int, str]]:
    """Run one layer's series through the state machine; return step and state of each change."""
    history = History(["layer"])
    alarms = Alarms([Size(**settings)], history.layers)
    changes: list[tuple[int, str]] = []
    for step, value in enumerate(series(text)):
        history.push(Row(step, 1.0, np.array([value]), value))
        changes += [(alarm.step, alarm.state) for alarm in alarms.update(history, step)]
    return changes


def test_an_alarm_fires_at_once_and_resolves_after_keep_steps() -> None:
    """With `for_steps` 1 and `keep_steps` 2 it fires on the step and lets go on the third calm one."""
    assert states("1x3 50 1x6", keep_steps=2) == [(3, "firing"), (6, "resolved")]


def test_a_condition_must_hold_for_its_steps() -> None:
    """Two of three steps are not enough; three are."""
    assert states("50x2 1 50x2 1", for_steps=3) == []
    assert states("1 50x3 1", for_steps=3) == [(3, "firing")]


def test_a_return_within_keep_steps_does_not_start_a_second_alarm() -> None:
    """Flapping is one alarm."""
    assert states("50 1 50 1 50 1x9", keep_steps=3) == [(0, "firing"), (8, "resolved")]


def test_hysteresis_keeps_an_alarm_until_the_value_is_well_below_its_limit() -> None:
    """With `release` 0.1 a value of 5 does not resolve a limit of 10; one of 0.5 does."""
    assert states("50 5x9 0.5x3", keep_steps=1, release=0.1) == [(0, "firing"), (11, "resolved")]


def test_nan_is_no_alarm() -> None:
    """Where a rule cannot tell, nothing fires."""
    assert states("nanx5") == []


def test_steps_between_two_looks_count_as_held() -> None:
    """A rule that is looked at every 16 steps still reaches its `for_steps`."""
    history = History(["layer"])
    alarms = Alarms([Size(for_steps=32)], history.layers)
    fired = []
    for step in range(0, 64, 16):
        history.push(Row(step, 1.0, np.array([50.0]), 50.0))
        fired += [alarm.step for alarm in alarms.update(history, step)]
    assert fired == [32]


def test_a_rule_that_raises_is_switched_off_and_told_once() -> None:
    """The others go on."""

    class Broken(Size):
        code: ClassVar[str] = "XX002"

        def measure(self, history: History) -> Floats:
            raise ZeroDivisionError(str(history.rows))

    told = []
    history = History(["layer"])
    alarms = Alarms([Broken(), Size()], history.layers, on_error=lambda part, error: told.append((part, str(error))))
    fired = []
    for step in range(3):
        history.push(Row(step, 1.0, np.array([50.0]), 50.0))
        fired += alarms.update(history, step)
    assert told == [("rule XX002 size", "1")]
    assert [alarm.code for alarm in fired] == ["XX001"]


def test_closeness_is_value_over_limit_of_the_closest_rule() -> None:
    """The live view sorts by it."""
    history = History(["a", "b"])
    alarms = Alarms([Size(), Size(limit=100.0)], history.layers)
    history.push(Row(0, 1.0, np.array([5.0, 20.0]), 1.0))
    alarms.update(history, 0)
    closeness, closest = alarms.closeness()
    assert closeness.tolist() == [0.5, 2.0]
    assert closest.tolist() == [0, 0]
