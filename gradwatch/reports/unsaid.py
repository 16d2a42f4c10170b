"""Advice that was not given before: what recurs is not said again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.records import Incident


def unsaid(incident: Incident, advised: dict[str, int]) -> list[str]:
    """Return the advice on an incident, in which what was given on an earlier one is referred to by its step."""
    new = [line for line in incident.advice if advised.get(line, incident.opened_step) == incident.opened_step]
    earlier = sorted({advised[line] for line in incident.advice if line not in new})
    for line in new:
        advised.setdefault(line, incident.opened_step)
    return [*new, *([f"as at step {' and '.join(map(str, earlier))}"] if earlier else [])]
