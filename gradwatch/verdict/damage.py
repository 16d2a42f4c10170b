"""What an incident leaves behind when its alarms are over. Nothing is called resolved that is worse than before the fault."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.ending import not_learned
from gradwatch.history.losses import EARLY
from gradwatch.history.optimizer_rows import places_of, with_losses_of_their_own
from gradwatch.history.statistics import median, median_and_mad
from gradwatch.text.wording import counted, median_in_words, number

if TYPE_CHECKING:
    from collections.abc import Container

    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Floats

_LEVEL = 16  # losses whose median is the level now, and rows in which a part that is not dead has a gradient
_PAST = 32  # losses before the fault whose median is the level then
_NOW = 64  # losses whose scatter is that of a single one now
_CHANCE = 3.0  # scatters by which a single loss may be above its level by chance
_BACK = 8  # losses of which most are at their level once it is back
_NOISE = 0.63  # two standard errors of a median of 16 losses, in their scatter
_MOSTLY = 0.5  # share of it from which on a notice counts: a loss that the program changes may stay up
_UNDONE = 0.25  # share of what the loss had fallen that is lost where what was learned is undone
_NAMED = 3  # dead layers that are named


@dataclass(frozen=True, slots=True)
class Before:
    """A run before a fault, as far as it is known.

    Attributes:
        step: step of the first sign.
        loss: level of the loss; NaN if it is not known.
        ceiling: level up to which the loss counts as back, within its scatter and a quarter of what had been learned; NaN if it
            is not known. A run that had not learned yet is back once it has learned something, more than single losses vary by.
        young: whether the fault came with the first steps, so that no level of the loss is known from before.
        began: whether the level is the loss of the first step.
        settled: whether the level is that of enough losses for a notice to have undone it.
        flowing: whether the gradients of each layer flowed, shape (L,).
        task: number of the row at which the task began that the run then had.
        broken: which weights or buffers were not finite already, in words; empty if all were.
        held: whether the optimizer of the first sign holds each layer, shape (L,), where several take turns with losses of their
            own: only those of its steps are compared; None: all are.
        whose: the first of these layers; "" if all losses are compared.
    """

    step: int
    loss: float
    ceiling: float
    young: bool
    began: bool
    settled: bool
    flowing: NDArray[np.bool_]
    task: int
    broken: str = ""
    held: NDArray[np.bool_] | None = None
    whose: str = ""


def before_fault(history: History, step: int) -> Before:
    """Return the run before ``step``, the step of the first sign of a fault.

    The level of the loss is the median of the last 32 losses before that step. While fewer than 12 are known, it is the loss of
    the first step, if that is lower: a median of losses that already rise is none.
    """
    steps, norms = history.steps(last=history.task_rows), history.grad_norm(last=history.task_rows)
    earlier = max(int(np.count_nonzero(steps < step)), 1)  # the loss of the first step is older than any update
    flowing: NDArray[np.bool_] = np.any(norms[:earlier] > 0, axis=0)
    parts = with_losses_of_their_own(history)
    held = parts[0].held if parts else None
    whose = history.layers[int(np.argmax(held))] if held is not None else ""
    places = places_of(history, held)
    places = places[history.steps()[places] < max(step, int(steps[0]) + 1)]
    calm = places[history.outside(history.explosions)[places]]
    known = history.loss()[calm if len(calm) >= EARLY else places]
    known = known[np.isfinite(known)][-_PAST:]
    level, ceiling = _level_and_ceiling(known)
    if history.first_loss > level:  # what has been learned since must not be lost again
        learned = _UNDONE * (history.first_loss - level)
        ceiling = min(ceiling, level + max(learned, abs(level) / 10, _NOISE * median_and_mad(known)[1]))
    young = known.size < EARLY
    began = young and known.size > 0 and level == history.first_loss
    task = history.rows - history.task_rows
    return Before(step, level, ceiling, young, began, not young, flowing, task, held=held, whose=whose)


def _level_and_ceiling(losses: Floats) -> tuple[float, float]:
    if not losses.size:
        return math.nan, math.nan
    middle, scatter = median_and_mad(losses)
    if losses.size >= EARLY:
        return middle, max(float(np.quantile(losses, 0.9)), middle + max(3 * scatter, abs(middle) / 10))
    level = min(middle, float(losses[0]))
    return level, level - abs(level) / 10


def level_now(history: History, before: Before) -> float:
    """Return the median of the last 16 losses to compare, in which NaN counts as infinite; NaN if none was seen."""
    losses = _last_losses(history, before)
    return median(np.nan_to_num(losses, nan=math.inf)) if history.losses and losses.size else math.nan


def _last_losses(history: History, before: Before) -> Floats:
    if before.held is None:
        return history.task_loss(last=_LEVEL)
    places = places_of(history, before.held)[-_LEVEL:]
    return history.loss()[places[history.steps()[places] > before.step]]


def damage_since(history: History, before: Before, broken: str, silent: Container[str] = ()) -> tuple[str, ...]:
    """Return what is worse than before the fault, a sentence each; none if nothing is, as far as it is known.

    Of a fault that came with the first steps, no level of the loss is known from before: a loss that has not been learned since,
    although there was time for it, counts as worse.

    Args:
        history: the history of the run.
        before: the run before the fault.
        broken: which weights or buffers are not finite, in words; empty if all are.
        silent: layers that count as dead although a gradient has woken them for a step.
    """
    found = []
    same_task = history.rows - history.task_rows == before.task
    level = level_now(history, before)
    ceiling = before.ceiling
    if before.began and ceiling < before.loss:  # a single loss, which may have been high by chance
        _, scatter = median_and_mad(history.task_loss(last=_NOW))
        ceiling = min(ceiling, before.loss - _CHANCE * scatter)
    high = same_task and not math.isnan(level) and level > ceiling and not history.need_not_fall
    stands = not_learned(history) if same_task and before.young and not level > before.ceiling else ""
    if stands:
        found.append(f"the loss {stands}")
    elif high:
        now = median_in_words(level, len(_last_losses(history, before)))
        where = f", where the optimizer of {before.whose} steps," if before.whose else ""
        found.append(f"at step {history.row.step}{where} the loss is {now}, {_then(before, level)}")
    dead = dead_since(history, before, silent) if same_task else []
    if dead and (history.row.global_norm > 0 or high):  # without any gradient, the loss may be at its floor
        more = f" and {counted(len(dead) - _NAMED, 'more layer')}" if len(dead) > _NAMED else ""
        are = "is" if len(dead) == 1 else "are"
        found.append(f"{', '.join(dead[:_NAMED])}{more} {are} dead: no gradient arrives where one did")
    if broken and broken != before.broken:
        found.append(broken)
    return tuple(found)


def is_undone(history: History, before: Before, share: float = _UNDONE) -> bool:
    """Return whether the loss is above its level before the fault by a ``share`` of what it had fallen since the first step."""
    return level_now(history, before) > before.loss + share * max(0.0, history.first_loss - before.loss)


def is_mostly_undone(history: History, before: Before) -> bool:
    """Return whether the loss has lost half of what it had fallen before the fault; False where no level of it is known."""
    known = history.rows - history.task_rows == before.task and before.settled and not history.need_not_fall
    return known and level_now(history, before) > before.ceiling and is_undone(history, before, _MOSTLY)


def _then(before: Before, level: float) -> str:
    """Return the level of the loss before the fault, as the end of a sentence about ``level``, which is not back there."""
    if level > before.loss:
        return (
            f"it began at {number(before.loss)}"
            if before.began
            else f"it was {number(before.loss)} before step {before.step}"
        )
    if before.began and level < before.loss - abs(before.loss) / 10:
        return f"below the {number(before.loss)} at which it began by no more than single losses vary"
    then = "at which it began" if before.began else f"that it had before step {before.step}"
    return f"hardly below the {number(before.loss)} {then}"


def dead_since(history: History, before: Before, silent: Container[str] = ()) -> list[str]:
    """Return the layers whose gradient flowed before the fault and was exactly zero in each of the last rows that had one.

    Those of ``silent`` count as well.
    """
    last = history.grad_norm(last=min(_LEVEL, history.task_rows))
    quiet = (last == 0).any(axis=0) & ~(last > 0).any(axis=0) & ~(history.nonfinite > 0)
    quiet |= np.array([name in silent for name in history.layers], dtype=bool)
    flowed = before.flowing[: len(quiet)]
    return [history.layers[index] for index in np.flatnonzero(quiet[: len(flowed)] & flowed).tolist()]


def recovered_after(history: History, before: Before, start: int, end: int | None = None) -> int | None:
    """Return the number of steps from ``start`` until the loss was back at its level before the fault; None if no loss is kept.

    It is back at the first loss after one above the level from which on the median of 8 losses is not above it either. 0 if none
    was above. Steps from ``end`` on are not counted; None: all are.
    """
    losses, steps = history.loss(), history.steps()
    if before.held is not None:
        places = places_of(history, before.held)
        losses, steps = losses[places], steps[places]
    losses = losses[(steps >= start) & (steps < (math.inf if end is None else end))]
    back = losses <= np.fmax(before.ceiling, before.loss)
    if not losses.size:
        return None
    if back.all():
        return 0
    first = int(np.argmin(back))
    later = (place for place in range(first, len(losses)) if back[place] and back[place : place + _BACK].mean() > 0.5)
    return next(later, len(losses))
