"""Replay of recorded or written rows, to see what would have fired with other limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError
from gradwatch.pipeline import Pipeline
from gradwatch.reports.notes import Notes
from gradwatch.rules import rule_by_code
from gradwatch.verdict import VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Incident, Origin, Row
    from gradwatch.rules import Rule


@dataclass(frozen=True)
class Replayed:
    """The result of a replay: the number of rows, all alarms that changed state, and the incidents."""

    rows: int
    alarms: tuple[Alarm, ...]
    incidents: tuple[Incident, ...]


def replay(
    history: History,
    rows: Iterable[Row],
    rules: Sequence[Rule],
    verdict: VerdictSettings | None = None,
    origins: Iterable[Origin] = (),
) -> Replayed:
    """Judge rows by the whole pipeline, without auto-clip and reports, and return the alarms and incidents.

    Args:
        history: empty history with the columns of the rows; it holds the last rows afterwards.
        rows: rows as a training would produce them, oldest first.
        rules: rules to judge with.
        verdict: limits of the verdict; None: the defaults.
        origins: operations that were found while the rows were recorded, which no rows can tell.
    """
    found = {origin.step: origin for origin in origins}

    def broken() -> str:  # there is no model to look at
        return history.damage_seen

    pipeline = Pipeline(history, rules, None, [], Notes(strict=True), verdict=verdict, keep=None, broken=broken)
    count = 0
    for row in rows:
        count += 1
        if row.step in found:
            pipeline.found(found[row.step])
        pipeline.judge(row)
    return Replayed(count, tuple(pipeline.changes), tuple(pipeline.incidents.all))


def with_settings(rules: Sequence[Rule], settings: Sequence[str]) -> tuple[list[Rule], VerdictSettings]:
    """Return the rules and the limits of the verdict with some of their settings changed.

    Args:
        rules: rules to change.
        settings: changes such as ``"GW203.limit=2"``, each with the code or class name of a rule (or ``verdict``), the name of
            a setting and its new value.

    Raises:
        UsageError: there is no such rule or setting, or the value is out of its range.
    """
    changed, verdict = {rule.code: rule for rule in rules}, VerdictSettings()
    for setting in settings:
        place, equals, value = setting.partition("=")
        code, dot, name = place.partition(".")
        if not (equals and dot and name and value):
            raise UsageError(
                f"{setting!r} is not a setting of a rule: expected CODE.SETTING=VALUE, such as GW203.limit=2, "
                "or verdict.SETTING=VALUE."
            )
        if code == "verdict":
            verdict = VerdictSettings(**{**verdict.model_dump(), name: value})
            continue
        rule = rule_by_code(code)
        if rule.code not in changed:
            raise UsageError(
                f"The run was not judged by {rule.code}, but by {', '.join(sorted(changed)) or 'no rule'}."
            )
        changed[rule.code] = rule(**{**changed[rule.code].model_dump(), name: value})
    return list(changed.values()), verdict
