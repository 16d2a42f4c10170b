"""How far a run ends from its repaired twin, by the labels of the fault set."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.faults.programs import LABELS, PROGRAMS

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
