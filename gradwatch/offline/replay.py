"""Rules over rows that were recorded or written: what would have fired with other thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError, did_you_mean
from gradwatch.pipeline import Pipeline
from gradwatch.reports.notes import Notes
from gradwatch.rules import rule_by_code
from gradwatch.verdict.settings import VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Incident, Row
    from gradwatch.rules import Rule


@dataclass(frozen=True)
class Replayed:
    """What the rules said: ``rows`` is how many they were given, ``alarms`` are all their changes of state."""

    rows: int
    alarms: tuple[Alarm, ...]
    incidents: tuple[Incident, ...]


def replay(
    history: History, rows: Iterable[Row], rules: Sequence[Rule], verdict: VerdictSettings | None = None
) -> Replayed:
    """Run the whole pipeline over rows, without auto-clip and reports.

    Args:
        history: empty, with the columns of the rows; it holds the last of them afterwards.
        rows: as a training would hand them over, oldest first.
        rules: the rules to judge with.
        verdict: the verdict's own limits; None: its defaults.
    """
    pipeline = Pipeline(history, rules, None, [], Notes(strict=True), verdict=verdict, keep=None)
    count = 0
    for row in rows:
        count += 1
        pipeline.judge(row)
    return Replayed(count, tuple(pipeline.changes), tuple(pipeline.incidents.all))


def with_settings(rules: Sequence[Rule], settings: Sequence[str]) -> tuple[list[Rule], VerdictSettings]:
    """Return the rules, and the verdict's limits, with some of their settings changed.

    Args:
        rules: the rules as they are.
        settings: such as ``"GW203.limit=2"``: a rule's code or class name, or ``verdict``, a setting of it, its new value.

    Raises:
        UsageError: there is no such rule or setting, or the value is out of its range.
    """
    changed, verdict = {rule.code: rule for rule in rules}, VerdictSettings()
    for setting in settings:
        place, equals, value = setting.partition("=")
        code, dot, name = place.partition(".")
        if not (equals and dot and name and value):
            raise UsageError(
                f"{setting!r} is no setting of a rule: expected CODE.SETTING=VALUE, such as GW203.limit=2, "
                "or verdict.SETTING=VALUE."
            )
        if code == "verdict":
            verdict = VerdictSettings(**{**verdict.model_dump(), name: value})
            continue
        rule = rule_by_code(code)
        if rule.code not in changed:
            raise UsageError(f"The run was not judged by {rule.code}.{did_you_mean(rule.code, changed)}")
        changed[rule.code] = rule(**{**changed[rule.code].model_dump(), name: value})
    return list(changed.values()), verdict
