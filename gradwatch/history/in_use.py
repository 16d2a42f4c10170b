"""The usual range of a run's global norms, and what its clips did, over the rows that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.optimizer_rows import rows_by_optimizer
from gradwatch.history.typical_norm import LEAST_NORMS, PAST
from gradwatch.records import SCALED_UP, ClipUse, UsualNorms

if TYPE_CHECKING:
    from gradwatch.history.history import History

_OUTSIDE = 0.05  # share of norms below the usual range, and above it


def usual_norms_of(history: History, until: int | None = None) -> UsualNorms | None:
    """Return the range of the last 256 norms of the current task; None if fewer than 16 are finite and not zero.

    The last row is not counted, nor are rows from step ``until`` on and those of explosions.
    Where several optimizers take turns, only the rows of the one that made the last step count.
    """
    mine, *others = rows_by_optimizer(history, 2 * PAST)
    steps = history.steps()
    places = mine.places if others and mine.places is not None else np.arange(len(steps))
    places = places[places >= len(steps) - history.task_rows][:-1]
    if until is not None:
        places = places[steps[places] < until]
    norms, steps, calm = history.global_norm()[places], steps[places], history.outside(history.explosions)[places]
    apart = not calm[-PAST:].all()
    norms, steps = norms[calm][-PAST:], steps[calm][-PAST:]
    told = np.isfinite(norms) & (norms > 0)
    if np.count_nonzero(told) < LEAST_NORMS:
        return None
    ordered = np.sort(norms[told])
    out = int(_OUTSIDE * len(ordered))
    low, high, now = float(ordered[out]), float(ordered[-1 - out]), history.row.global_norm
    return UsualNorms(low, high, int(steps[told][0]), now, until, history.measured, apart, bool(others))


def clip_use_of(history: History, *, auto_clipped: bool) -> ClipUse | None:
    """Return what the clips did in the kept rows that were not skipped; None for fewer than 16 or if none may act on each step.

    Args:
        history: the history of the run.
        auto_clipped: whether auto-clip has clipped a step of the run.
    """
    if history.rows < LEAST_NORMS or not history.clips_each_step:
        return None
    auto = "auto-clip" if history.facts.clips_always or auto_clipped else ""
    yours = "your clip" if history.clipped_by_user else ""
    left = history.clip_coefficient()[~history.skipped()]
    cut = left[left < 1]
    whose = " and ".join(filter(None, (yours, auto)))
    enlarged = int(np.count_nonzero(left > SCALED_UP))
    return ClipUse(whose, len(left), len(cut), float(cut.min()) if len(cut) else float("nan"), enlarged)
