"""The size that norms and losses reach repeatedly. Signals that are rare or bursty by nature are no explosion.

A batch with a rare class, a reward or a hard example has a gradient many times the usual size, and the next batch is back to
normal. The height of such excursions is the reference for the next one. As a rule an explosion does not come back, so it is
no reference for itself, and rows of destructive ones are left out (see `gradwatch.verdict.incidents`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import ignore_fp_warnings, median_and_mad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Floats

ONE_STEP = 10.0  # a surge of a single step counts this many times less than one that lasts
AT_REST = 2.0  # multiple of the typical size up to which values are ordinary
_TIMES = 3  # excursions of a height that make it usual: two may be chance
_MOMENTUM = 0.9  # assumed for SGD: an upper bound of the update where the momentum is smaller
_REMEMBERED = 32  # updates that are summed: with a momentum of 0.9 the rest is 3 %
_ALONE = 0.1  # share of the height of a jump below which the next loss shows that it was one batch
_BEYOND = 2.0  # multiple of the explained rise beyond which the rise is due to the batch


def usual_peak(values: Floats, at_rest: float) -> float:
    """Return the third-highest peak of the excursions in ``values``; 0.0 if there are fewer than three.

    An excursion is a stretch of values above ``at_rest`` between two values that are not. ``values`` has shape (n,), oldest
    first; values that are not finite are ignored.
    """
    values = values[np.isfinite(values)]
    resting = np.flatnonzero(values <= at_rest)
    if len(resting) <= _TIMES:
        return 0.0
    between = np.flatnonzero(np.diff(resting) > 1)
    if len(between) < _TIMES:
        return 0.0
    # from each value at rest before an excursion to the next one: the last segment ends at the last value at rest
    edges = np.column_stack((resting[between] + 1, resting[between + 1])).ravel()
    peaks = np.maximum.reduceat(values, edges)[::2]
    return float(np.partition(peaks, -_TIMES)[-_TIMES])


def usual_size(values: Floats, typical: float) -> float:
    """Return the larger of ``typical`` and half the usual peak of excursions beyond twice ``typical``.

    ``values`` has shape (n,), oldest first, and does not include the value that is compared with the result.
    """
    return max(typical, usual_peak(values, AT_REST * typical) / AT_REST)


def jump_scale(history: History, window: int, *, recurring: bool, coming: bool = False) -> tuple[float, float]:
    """Return the level of losses, and the scale in which GW102 measures a jump above it; (NaN, NaN) if none is finite.

    Args:
        history: the history of the run.
        window: number of the newest losses before the measured one that the level is taken from.
        recurring: whether peaks count that all of the losses reach repeatedly: looking for them takes a while.
        coming: whether the coming loss is measured; else the last one is.
    """
    rows = history.task_rows if recurring else window + 1
    losses = history.task_loss(last=rows)
    past = losses if coming else losses[:-1]
    newest = past[-window:]
    middle, spread = median_and_mad(newest)
    if math.isnan(middle):
        return math.nan, math.nan
    highest = float(newest[np.isfinite(newest)].max())
    scale = max(spread, abs(middle) / 10, abs(history.reference_loss) / 20, (highest - middle) / 5)
    if recurring:
        at_rest = middle + 3 * max(spread, abs(middle) / 10)
        calm = past[history.outside(history.destructive, rows)[: len(past)]]
        scale = max(scale, (usual_peak(calm, at_rest) - middle) / 5)
    return middle, scale


def usual_norms(history: History, columns: Sequence[int]) -> Floats:
    """Return the usual gradient norm of the given layers, not including the last row, shape (len(columns),)."""
    past = history.grad_norm(last=history.task_rows)[:-1]
    past = past[history.outside(history.destructive, history.task_rows)[:-1]]
    usual = history.usual_grad
    return np.array([usual_size(past[:, column], float(usual[column])) for column in columns])


def spread_of(history: History) -> Floats:
    """Return the factor on the limit of a surge for layers whose norms scatter by more than a decade, shape (L,), at least 1."""
    wide: Floats = np.maximum(1.0, np.exp(4 * history.typical_grad.scatter) / ONE_STEP)
    return wide


def one_step_norms(history: History) -> Floats:
    """Return the norms that a surge of a single step is measured by, shape (L,); NaN where `History.has_usual` is false.

    A surge that lasts for one step counts a tenth of one that lasts (GW301), so these are ten times the usual norms.
    """
    usual, past = history.usual_grad, history.grad_norm(last=history.task_rows)
    with ignore_fp_warnings():
        peaks = np.fmax.reduce(past, axis=0, initial=0.0)
        high = np.flatnonzero(peaks > ONE_STEP * usual)  # only there larger norms may recur
        if high.size:
            usual[high] = usual_norms(history, high.tolist())
        return np.where(history.has_usual, ONE_STEP * spread_of(history) * usual, np.nan)


def explained_rise(history: History) -> float:
    """Return the most that the last update can have raised the last loss, to first order: ``sum_l ||g_l|| ||dw_l||``.

    This is an upper bound for a loss that is convex along the update. ``g_l`` is the gradient after the update. ``||dw_l||``
    is the sum of ``lr ||g||`` over earlier steps with a momentum of 0.9 for SGD, and for optimizers like Adam the larger of
    ``lr sqrt(n)`` and the measured change of the weight norm. Infinite if the optimizer or its learning rate is not known.
    """
    row = history.row
    rate = np.abs(history.previous_rate)  # one below zero goes as far
    if row.family == "other" or not np.isfinite(rate).any():
        return np.inf
    with ignore_fp_warnings():
        if row.family == "sgd":
            norms = history.grad_norm(last=min(_REMEMBERED + 1, history.task_rows))[:-1]
            norms = norms * history.clip_coefficient(last=len(norms) + 1)[:-1, None]
            fades = _MOMENTUM ** np.arange(len(norms))[::-1]
            moved = rate * (fades @ np.nan_to_num(norms))
        else:
            measured = np.abs(history.weight - history.previous_weight)  # all of it may be due to the last update
            moved = np.fmax(rate * np.sqrt(history.sizes), measured)
        return float(np.nansum(row.grad_norm * moved))


def moved_by_another(history: History) -> bool:
    """Return whether the last update was that of another optimizer, of whose layers the last row has no gradient.

    What that update has done to the loss is not known then, and `explained_rise` leaves it out.
    """
    row = history.row
    if row.rate is None:
        return False
    return bool(((history.previous_rate > 0) & ~np.isfinite(row.rate) & np.isnan(row.grad_norm)).any())


def task_became_harder(history: History) -> bool:
    """Return whether the last loss is due to the batch and more than twice as large as each of the four before it."""
    before = np.abs(history.loss(last=5)[:-1])
    return history.row.loss > 2 * np.max(before, initial=0.0) and is_of_the_batch(history)


def was_one_batch(history: History, step: int) -> bool:
    """Return whether the loss jumped at ``step`` alone: less than a tenth of that height was left in the next one.

    New targets or new data would have kept it up. False if it is not known.
    """
    place = int(np.searchsorted(history.steps(), step))
    losses = history.loss()
    if not 0 < place < len(losses) - 1 or history.steps()[place] != step:
        return False
    before, peak, after = losses[place - 1 : place + 2]
    return bool(after - before < _ALONE * (peak - before))


def is_of_the_batch(history: History) -> bool:
    """Return whether the last loss is too far above its level to be caused by the last update: the batch is odd or rare."""
    level, _ = history.loss_level()
    return history.row.loss - level > _BEYOND * explained_rise(history)
