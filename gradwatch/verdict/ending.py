"""How the loss stands at the last row, where that is nothing to be content with although no alarm may fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import median, median_and_mad
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from gradwatch.history.history import History

_LEVEL = 32  # losses whose median is a level
_ENOUGH = 100  # losses after which a run could have left the level at which it began
_NEAR = 0.05  # share of the first loss within which the level is the same
_LONG = 200  # losses after which levels of the past are compared with the last one
_LOST = 0.25  # share of what the loss had fallen by which it is above its best level
_HIGH = 0.6  # share of the reference loss above which a loss that does not fall has not learned much
_SILENT = 64  # rows without any gradient after which nothing is learned any more


def how_it_stands(history: History) -> str:
    """Return how badly the loss stands at the last row, as the rest of a sentence that begins with "the loss"; else "".

    It is NaN; every gradient is zero; it is where it began or above; it is above its best level; or it is high and has not fallen
    for long. Where the loss need not fall, only NaN and missing gradients are told.
    """
    if history.lost_since is not None:
        return f"is {history.row.loss} since step {history.lost_since:,}"
    level, scatter = median_and_mad(history.task_loss(last=_LEVEL))
    norms = history.global_norm(last=_SILENT)
    if len(norms) == _SILENT and (norms == 0).all() and history.losses:
        return f"is {number(level)}, and every gradient has been zero since step {history.steps(last=_SILENT)[0]:,} or before"
    if history.losses < _ENOUGH or history.resting:
        return ""
    return _at_its_beginning(history, level) or _compared_with_its_past(history, level, scatter)


def _at_its_beginning(history: History, level: float) -> str:
    began = history.first_loss
    if not level >= began - _NEAR * abs(began):
        return ""
    where = "at" if level <= began + _NEAR * abs(began) else "above"
    return f"is {number(level)}, {where} the level at which it began ({number(began)})"


def _compared_with_its_past(history: History, level: float, scatter: float) -> str:
    losses, steps = history.task_loss(), history.steps(last=history.task_rows)
    seen = np.isfinite(losses)
    losses, steps = losses[seen], steps[seen]
    if len(losses) < _LONG:
        return ""
    stretches = np.array_split(np.arange(len(losses)), len(losses) // _LEVEL)
    levels = [median(losses[stretch]) for stretch in stretches]
    best, began = int(np.argmin(levels)), history.reference_loss
    if level - levels[best] > max(_LOST * (began - levels[best]), 2 * scatter):
        about = steps[stretches[best][len(stretches[best]) // 2]]
        return f"is {number(level)}, above its best level of {number(levels[best])} about step {about:,}"
    third = len(levels) // 3
    if level > _HIGH * began > 0 and min(levels[:third]) - level < _NEAR * began:
        since = steps[stretches[third - 1][-1]]
        return f"is {number(level)} and has hardly fallen since step {since:,} (it began at {number(began)})"
    return ""
