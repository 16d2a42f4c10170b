"""GW101: the model gets no traction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign

_RECENT = 400  # losses over which a recent improvement is measured


class NoTraction(Rule):
    """The model gets no traction on the training data: the loss stays poor.

    ## What it means
    After `min_steps` (200) losses the loss is still close to that of its first 16 steps.

    ## Formula
    `value = max(s, |r| / 50) / (r - m)`, infinite where `m >= r`: the smallest improvement that counts, divided by the
    improvement so far. `r` is the reference loss (median of the run's first 16 finite losses); `m` and `s` are the median
    and the scaled MAD of the last `window` (50) losses. It fires where `value > limit` (1.0) for `for_steps` (50) steps:
    the loss has improved by less than two per cent, or by less than it varies from batch to batch. It is `0` for a cross-entropy
    of less than half that of guessing among as many classes as the last matrix has units, which is not poor, and where the loss
    is exactly zero. It rests where the
    loss need not fall: where two optimizers take turns and the loss of one runs through what the other trains, and where it
    jumps with a period, farther than an update can raise it.

    Alone it is a notice, and a warning where the median matrix has less than a hundredth of a usual size, or your own clip leaves
    less than a ten-thousandth of the gradients: no model is good from the start with that.

    ## Why it is bad
    Steps are spent and nothing is learned. Possible causes are a learning rate that is zero, far too small, or so large
    that the weights ended up in a flat region; vanishing gradients; a part of the model that is cut off from the loss; an
    optimizer that holds other parameters; labels that do not match their inputs.

    ## What to do
    Look at GW401, GW402 and GW403 first, because they name layers. Overfit one batch: if that fails too, the fault is in
    the program, not in the data. Then change the learning rate by factors of three in both directions, and scale the inputs.

    ## When it is harmless
    A plateau before learning starts; a resumed or pretrained model that was good from the first step, unless its loss is a
    cross-entropy, of which this is known.

    ## Source
    The first of the signs by which practitioners suspect exploding gradients: Brownlee, "Gradient clipping" (2019).
    """

    code: ClassVar[str] = "GW101"
    name: ClassVar[str] = "no traction"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "stalled"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("flat for 300 steps", fires=248, loss="2.3x300"),
        Case("falls slowly but surely", fires=None, loss="2.3+-0.002x400"),
        Case("starts at 1e4 and falls", fires=None, loss="1e4*0.97x400"),
        Case("a negative loss that falls", fires=None, loss="-1+-0.01x400"),
    )

    limit: float = Field(default=1.0, gt=0)
    min_steps: int = Field(default=200, ge=20)
    window: int = Field(default=50, ge=5)
    for_steps: int = Field(default=50, ge=1)

    def measure(self, history: History) -> Floats:
        """Return the required improvement over the actual one, shape (1,); NaN before ``min_steps`` losses."""
        if history.losses < self.min_steps or history.resting:
            return np.array([np.nan])
        level, scatter = history.loss_level(self.window)
        if history.is_good_cross_entropy(level) or (level == 0 and scatter == 0):
            return np.zeros(1)
        return np.array([gain_missing(history, self.window)])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        losses = history.task_loss(last=self.window)
        level, scatter = median_and_mad(losses)
        began = history.reference_loss
        return {
            "loss": level,
            "began": began,
            "enough": began - max(scatter, abs(began) / 50) / self.limit,
            "finite": float(np.count_nonzero(np.isfinite(losses))),
            "of": len(losses),
            "new task": history.task_rows < history.rows,
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        now, began, enough = (alarm.numbers[name] for name in ("loss", "began", "enough"))
        first = f"its first 16 steps{' of the new task' if alarm.numbers['new task'] else ''} ({number(began)})"
        finite, of = alarm.numbers["finite"], alarm.numbers["of"]
        partly = f" (it was finite in {finite:.0f} of the last {of:.0f} steps)" if finite < of else ""
        begin, progress = f"about {number(now)} at step {alarm.step}", f"below {number(enough)} would be progress"
        if now - began > abs(began) / 50:
            return f"the loss was {begin}, above that of {first}{partly}"
        if began - now <= abs(began) / 50:
            return f"the loss was still {begin}, as in {first}; {progress}{partly}"
        return f"the loss was {begin}, below that of {first}, but by too little: {progress}{partly}"


def gain_missing(history: History, window: int, *, recent: bool = False) -> float:
    """Return the smallest improvement that counts, divided by the improvement so far; infinite if there is none.

    ``recent``: the improvement on the ``window`` losses up to 400 before the last one counts, where it is less than that so far;
    one per cent counts, or half of the scatter, which is about two standard errors of the difference of two such medians.
    """
    middle, scatter = median_and_mad(history.task_loss(last=window))
    began = history.reference_loss
    worth = max(scatter, abs(began) / 50)
    if recent:
        began = min(began, median_and_mad(history.task_loss(last=_RECENT + window)[:-_RECENT])[0])
        worth = max(scatter / 2, abs(began) / 100)
    gain = began - middle
    return worth / gain if gain > 0 else math.inf if gain <= 0 else math.nan


def began_at(history: History) -> float:
    """Return the loss at which the task began: the reference loss, or the first one where an explosion has raised that."""
    exploded = history.reference_loss > history.first_loss + abs(history.first_loss)
    return history.first_loss if exploded else history.reference_loss


def stuck_at(history: History) -> dict[str, float]:
    """Return the loss of a run whose loss is stuck (`History.stuck`) and the loss of its beginning, by name.

    That is the reference loss, or the first loss ("at once") where an explosion in the first steps has raised the reference.
    """
    began = began_at(history)
    at_once = float(began != history.reference_loss)
    return {"loss": median_and_mad(history.task_loss(last=32))[0], "began": began, "at once": at_once}


def in_words(alarm: Alarm) -> str:
    """Return that the loss was stuck at that of its beginning or above, or hung lower, from the numbers of `stuck_at`."""
    loss, began = alarm.numbers["loss"], alarm.numbers["began"]
    how = "hung" if began - loss > abs(began) / 10 else "was stuck"
    then = f"it began at {number(began)}" if alarm.numbers.get("at once") else f"{number(began)} in its first 16 steps"
    return f"the loss {how} at about {number(loss)} ({then})"
