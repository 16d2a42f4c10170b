"""When a run counts as harmed, and shares of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.repair.outcome import Outcome


def worse(run: Outcome, unclipped: Outcome, first: float, by: float) -> bool:
    """True when a healthy run ends worse than unclipped by this share of its loss, or of 2 % of its first one."""
    return not run.final - unclipped.final <= by * max(abs(unclipped.final), 0.02 * abs(first))


def share(hits: Iterable[bool]) -> str:
    """Return a share as text."""
    found = list(hits)
    return f"{100 * sum(found) / len(found):.0f} % ({sum(found)}/{len(found)})" if found else "none to judge"
