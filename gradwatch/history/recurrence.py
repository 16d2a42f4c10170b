"""What norms and losses reach again and again: signals that are rare or bursty by nature are no explosion.

A batch with a rare class, a reward, a hard example: its gradient is many times the usual one, and comes back to the usual
size with the next batch. How high such excursions go is the run's own yardstick for the next one. An explosion does not
come back, so that it never becomes a yardstick for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import quiet_numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Floats

AT_REST = 2.0  # times the typical size: up to here nothing is out of the ordinary
_TIMES = 3  # excursions that high make a habit: two may be chance
_MOMENTUM = 0.9  # of SGD: where it is less, updates are shorter than this says
_REMEMBERED = 32  # updates that are left of a momentum of 0.9: the rest is 3 % of it
_BEYOND = 2.0  # times what the update explains: the rest is the batch's


def usual_peak(values: Floats, at_rest: float) -> float:
    """Return the third-highest peak of the excursions in ``values``; 0.0 where there were fewer.

    An excursion lies between two values that are at most ``at_rest``. ``values`` (n,), oldest first; those that are not
    finite are left out.
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
    """Return the typical size, or more where excursions beyond twice of it are usual: half of their usual peak.

    ``values`` (n,), oldest first, without the one that is compared with it.
    """
    return max(typical, usual_peak(values, AT_REST * typical) / AT_REST)


def usual_norms(history: History, columns: Sequence[int]) -> Floats:
    """Return the usual gradient norm of these layers before the last row, shape (columns,)."""
    past = history.grad_norm(last=history.task_rows)[:-1]
    typical = history.typical_grad.value
    return np.array([usual_size(past[:, column], float(typical[column])) for column in columns])


def explained_rise(history: History) -> float:
    """Return by how much the last update can have raised the last loss, to first order: ``sum_l ||g_l|| ||dw_l||``.

    For a loss that is convex along the update this is an upper bound. ``g_l`` is the gradient after the update; ``||dw_l||``
    is ``lr ||g||`` of the steps before with a momentum of 0.9 for SGD, ``lr sqrt(n)`` or the measured change of the weight norm
    for optimizers of Adam's kind. Infinite where neither is known.
    """
    row = history.row
    rate = history.previous_rate
    if row.family == "other" or not np.isfinite(rate).any():
        return np.inf
    with quiet_numpy():
        if row.family == "sgd":
            norms = history.grad_norm(last=min(_REMEMBERED + 1, history.task_rows))[:-1]
            norms = norms * history.clip_coefficient(last=len(norms) + 1)[:-1, None]
            fades = _MOMENTUM ** np.arange(len(norms))[::-1]
            moved = rate * (fades @ np.nan_to_num(norms))
        else:
            measured = np.abs(history.weight - history.previous_weight)  # all of it may be the last update's
            moved = np.fmax(rate * np.sqrt(history.sizes), measured)
        return float(np.nansum(row.grad_norm * moved))


def task_became_harder(history: History) -> bool:
    """True when the last loss is of the batch, and twice as large as each of the four before: it came at once."""
    before = np.abs(history.loss(last=5)[:-1])
    return history.row.loss > 2 * np.max(before, initial=0.0) and is_of_the_batch(history)


def is_of_the_batch(history: History) -> bool:
    """True when the last loss lies so far above its level that the last update cannot have done it: the batch is odd or rare."""
    level, _ = history.loss_level()
    return history.row.loss - level > _BEYOND * explained_rise(history)
