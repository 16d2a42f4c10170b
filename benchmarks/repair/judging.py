"""When a run counts as repaired, and when as harmed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.faults.programs import LABELS, PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.repair.outcome import Outcome

LABEL: dict[str, dict[str, dict[str, Any]]] = json.loads(LABELS.read_text())
BY_NAME = {program.name: program for program in PROGRAMS}


def within_reach(name: str, seed: int, final: float) -> bool:
    """True when a run ends as near to the repaired twin as the fault set asks of a program that is not faulty."""
    twin = LABEL[name][str(seed)]["twin"]
    return bool(final - twin["final"] <= 0.5 * max(abs(twin["final"]), 0.02 * abs(twin["first"])))


def unwatched(name: str, seed: int) -> float:
    """Return the last loss of the unwatched run, as it was labelled."""
    final: float = LABEL[name][str(seed)]["faulty" if BY_NAME[name].twin else "healthy"]["final"]
    return final


def worse(run: Outcome, unclipped: Outcome, first: float, by: float) -> bool:
    """True when a healthy run ends worse than unclipped by this share of its loss, or of 2 % of its first one."""
    return not run.final - unclipped.final <= by * max(abs(unclipped.final), 0.02 * abs(first))


def share(hits: Iterable[bool]) -> str:
    """Return a share as text."""
    found = list(hits)
    return f"{100 * sum(found) / len(found):.0f} % ({sum(found)}/{len(found)})" if found else "none to judge"
