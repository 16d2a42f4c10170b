"""How a run stands, in the words that every report says: the verdict, and what must be said beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.records import EXPLOSION

if TYPE_CHECKING:
    from gradwatch.records import Snapshot


def standing(snapshot: Snapshot) -> tuple[str, ...]:
    """Return what belongs to the verdict of a snapshot, the most important first; nothing if the word says it all."""
    found = []
    if snapshot.step < 0:
        found.append("no step of an optimizer was seen, so nothing is known")
    if snapshot.verdict == "damaged":
        found += [line for incident in snapshot.incidents if incident.speaks_against_run for line in incident.left]
    if snapshot.verdict == "healthy":
        notices = [one for one in snapshot.incidents if one.severity == "notice" and one.verdict == "damaged"]
        found += [line for one in notices if one.kind in EXPLOSION for line in one.left]
        found += above_limits(snapshot)
    over = sum(incident.verdict == "resolved" and incident.severity != "notice" for incident in snapshot.incidents)
    if over:
        found.append(f"{over} incident{'s' * (over > 1)} resolved")
    return tuple(dict.fromkeys(found))


def sentences(snapshot: Snapshot) -> list[str]:
    """Return what belongs to the verdict, and how badly the loss stands, as sentences."""
    ending = how_the_loss_stands(snapshot)
    return [*standing(snapshot), *([ending] if ending else [])]


def how_the_loss_stands(snapshot: Snapshot) -> str:
    """Return how badly the loss stands, in a sentence; "" if it does not, or if what an incident has left says the same."""
    same = any("the loss " in line and "before step" not in line for line in standing(snapshot))
    more = "every gradient" in snapshot.ending or "finite" in snapshot.ending
    return f"the loss {snapshot.ending}" if snapshot.ending and (more or not same) else ""


def above_limits(snapshot: Snapshot) -> tuple[str, ...]:
    """Return which rules are above their limit although no incident is open, and on how many layers; nothing if none is."""
    over = np.flatnonzero(snapshot.closeness > 1)
    found, named = [], set()
    if over.size:
        named = {snapshot.rules[index] for index in np.unique(snapshot.closest[over])}
        layers = "1 layer above its limit" if over.size == 1 else f"{over.size} layers above their limit"
        found.append(f"{layers}: {' and '.join(sorted(named))}")
    if not any(incident.open for incident in snapshot.incidents):
        # a clip sign is a note already, and no matter of incidents
        noted = {rule for rule in snapshot.firing if any(f"({rule.split()[0]})" in note for note in snapshot.notes)}
        found += [
            f"{rule} fires, which opens no incident by itself" for rule in snapshot.firing if rule not in named | noted
        ]
    return tuple(found)
