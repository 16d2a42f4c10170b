"""How the loss stands at the last row, where that is nothing to be content with although no alarm may fire."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.optimizer_rows import with_losses_of_their_own
from gradwatch.history.statistics import median, median_and_mad
from gradwatch.text.wording import median_in_words, number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Floats

_LEVEL = 32  # losses whose median is a level
_ENOUGH = 100  # losses after which a run could have left the level at which it began
_NEAR = 0.05  # share of the first loss within which the level is the same
_GUESSED = 0.03  # share of the loss of guessing, as in GW405, within which a loss is no better
_LONG = 200  # losses after which levels of the past are compared with the last one
_LOST = 0.25  # share of what the loss had fallen by which it is above its best level
_HIGH = 0.6  # share of the reference loss above which a loss that does not fall has not learned much
_SILENT = 64  # rows without any gradient after which nothing is learned any more


def how_it_stands(history: History) -> str:
    """Return how badly the loss stands at the last row, as the rest of a sentence that begins with "the loss"; else "".

    It is NaN; every gradient is zero; it is where it began or above, no better than guessing, or above its best level; or
    it is high and has not fallen for long. Where the loss need not fall, only NaN and missing gradients are told.
    """
    if history.lost_since is not None:
        now = "NaN" if math.isnan(history.row.loss) else "infinite"
        if history.lost_since == history.row.step:
            return f"is {now} in the last step, {history.row.step:,}"
        return f"is {now}, and has not been finite since step {history.lost_since:,}"
    level, scatter = median_and_mad(history.task_loss(last=_LEVEL))
    norms = history.global_norm(last=_SILENT)
    differ = bool(with_losses_of_their_own(history))  # which have no level together
    if len(norms) == _SILENT and (norms == 0).all() and history.losses:
        silent = f"every gradient has been zero since step {history.steps(last=_SILENT)[0]:,} or before"
        now = f"{number(history.row.loss)} in the last step" if differ else _in_words(history, level)
        return f"is {now}, and {silent}"
    return "" if differ else _badly(history, level, scatter)


def hangs(history: History) -> bool:
    """Return whether the loss is stuck, or stands at a level from which a run that learns would have fallen.

    False where the loss need not fall, and for a cross-entropy that is good.
    """
    level, scatter = median_and_mad(history.task_loss(last=_LEVEL))
    return not history.is_good_cross_entropy(level) and (history.stuck or bool(_badly(history, level, scatter)))


def was_better(history: History) -> bool:
    """Return whether the loss is above its best level."""
    level, scatter = median_and_mad(history.task_loss(last=_LEVEL))
    return bool(_above_its_best(history, level, scatter, *_stretches(history)[:2]))


def not_learned(history: History) -> str:
    """Return that the loss is where it began or above, or high and has not fallen for long, as `how_it_stands` does; else ""."""
    level, scatter = median_and_mad(history.task_loss(last=_LEVEL))
    if history.losses < _ENOUGH or history.resting or history.is_good_cross_entropy(level):
        return ""
    if with_losses_of_their_own(history):
        return ""
    stretches = _stretches(history)
    return _at_its_beginning(history, level) or _has_hardly_fallen(history, level, scatter, *stretches)


def _in_words(history: History, level: float) -> str:
    """Return the level of the last losses with their number: what an incident has left is told by fewer of them."""
    return median_in_words(level, int(np.count_nonzero(np.isfinite(history.task_loss(last=_LEVEL)))))


def _badly(history: History, level: float, scatter: float) -> str:
    if history.losses < _ENOUGH or history.resting:
        return ""
    if at := _at_its_beginning(history, level) or _no_better_than_guessing(history, level):
        return at
    levels, middles, ends = _stretches(history)
    return _above_its_best(history, level, scatter, levels, middles) or _has_hardly_fallen(
        history, level, scatter, levels, middles, ends
    )


def _at_its_beginning(history: History, level: float) -> str:
    began = history.first_loss
    if not level >= began - _NEAR * abs(began) or began == 0:  # it could not fall
        return ""
    where = "at" if level <= began + _NEAR * abs(began) else "above"
    return f"is {_in_words(history, level)}, {where} the level at which it began ({number(began)})"


def _no_better_than_guessing(history: History, level: float) -> str:
    guessing = history.guessing
    if not level >= (1 - _GUESSED) * guessing > 0:
        return ""
    classes = f"{math.exp(guessing):.0f} classes ({number(guessing)})"
    return f"is {_in_words(history, level)}, no better than guessing among {classes}"


def _stretches(history: History) -> tuple[list[float], list[int], list[int]]:
    """Return the levels of the loss over stretches of about 32 losses, and the middle and last step of each; none if too few."""
    losses, steps = history.task_loss(), history.steps(last=history.task_rows)
    seen = np.isfinite(losses)
    losses, steps = losses[seen], steps[seen]
    return stretches_of(losses, steps) if len(losses) >= _LONG else ([], [], [])


def stretches_of(losses: Floats, steps: NDArray[np.int64]) -> tuple[list[float], list[int], list[int]]:
    """Return the levels of losses over stretches of about 32, and the middle and last step of each, given their steps."""
    stretches = np.array_split(np.arange(len(losses)), max(1, len(losses) // _LEVEL))
    return (
        [median(losses[stretch]) for stretch in stretches],
        [int(steps[stretch[len(stretch) // 2]]) for stretch in stretches],
        [int(steps[stretch[-1]]) for stretch in stretches],
    )


def _above_its_best(history: History, level: float, scatter: float, levels: list[float], middles: list[int]) -> str:
    if not levels:
        return ""
    best = int(np.argmin(levels))
    if level - levels[best] > max(_LOST * (history.reference_loss - levels[best]), 2 * scatter):
        now = _in_words(history, level)
        return f"is {now}, above its best level of {number(levels[best])} about step {middles[best]:,}"
    return ""


def _has_hardly_fallen(
    history: History, level: float, scatter: float, levels: list[float], middles: list[int], ends: list[int]
) -> str:
    began, third = history.reference_loss, len(levels) // 3
    if levels and level > _HIGH * began > 0 and min(levels[:third]) - level < _NEAR * began:
        if above := _above_its_best(history, level, scatter, levels, middles):
            return above
        how = "hardly" if level < began else "not"
        since = f"{ends[third - 1]:,} ({number(began)} in its first 16 steps)"
        return f"is {_in_words(history, level)} and has {how} fallen since step {since}"
    return ""
