"""GW105: the loss jumped up from far below where it began, and stays there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.statistics import median
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign

_FIRST = 8  # losses after the jump with which later ones are compared


class LossStaysUp(Rule):
    """The loss stays up: it jumped from far below where it began, and does not come back.

    ## What it means
    Within some sixty steps the run has lost most of the orders of magnitude that its loss had fallen by.

    ## Formula
    `value = m / max(times b, sqrt(r b), least r)`, where `m` is the median of the last `window` (64) losses, `b` that of as many
    before them, and `r` the reference loss (median of the first 16): above the root, the loss is back by more than half of the
    way, measured in logarithms. `value = 0` until three quarters of the older half of the window are above that denominator, and
    while the loss comes down: the median of the newer half is at least a tenth, `falling`, below that of the older half, or has
    halved since the highest of the first 8 losses after the jump. It is also `0` where the loss need not fall. It fires where
    `value > limit` (1.0), with `times` = 10 and `least` = 0.01. Losses at or below zero have no logarithm and do not count.

    ## Why it is bad
    GW102 leaves jumps alone that are small beside the first losses, because a converged run and batches with a rare class make
    them. What lasts is neither.

    ## What to do
    Look at what changed at that step: the data, the targets, the scale of the inputs, the rate, weights that were loaded.

    ## When it is harmless
    A new task that is learned so slowly that the loss falls by less than a tenth in 32 steps.

    ## Source
    The second of the practitioners' signs (Brownlee 2019), by levels instead of single updates; the limits are this project's.
    """

    code: ClassVar[str] = "GW105"
    name: ClassVar[str] = "loss stays up"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "diverging"
    role: ClassVar[Role] = "level"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a jump that lasts", fires=185, loss="100*0.9x60 0.2x70 20x80"),
        Case("a jump that comes back", fires=None, loss="100*0.9x60 0.2x70 20*0.98x150"),
        Case("one odd batch", fires=None, loss="100*0.9x60 0.2x70 60 0.2x80"),
        Case("less than half of the way", fires=None, loss="100*0.9x60 0.02x70 0.5x80"),
    )

    limit: float = Field(default=1.0, gt=0)
    times: float = Field(default=10.0, gt=1)
    least: float = Field(default=0.01, gt=0)
    falling: float = Field(default=0.1, gt=0, lt=1)
    window: int = Field(default=64, ge=8)

    def measure(self, history: History) -> Floats:
        """Return the level of the loss over the one up to which it may rise, shape (1,); 0 while it comes down."""
        losses = history.task_loss(last=2 * self.window)
        losses = losses[np.isfinite(losses)]
        if len(losses) < 2 * self.window or history.resting:
            return np.zeros(1)
        bound = self._bound(history, losses)
        level = median(losses[-self.window :])
        if not level > self.limit * bound > 0:
            return np.zeros(1)
        older, newer = np.split(losses[-self.window :], 2)
        if not np.sort(older)[len(older) // 4] > bound:
            return np.zeros(1)
        jumped = losses[_since(losses, bound) :][:_FIRST]
        stays = median(newer) > max((1 - self.falling) * median(older), float(jumped.max()) / 2)
        return np.array([level / bound if stays else 0.0])

    def _bound(self, history: History, losses: Floats) -> float:
        """Return the level up to which losses may rise, given the last two windows of them; NaN if there is none."""
        before = median(losses[: self.window])
        known = before > 0 and history.reference_loss > 0
        began = history.reference_loss
        return max(self.times * before, math.sqrt(began * before), self.least * began) if known else math.nan

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        losses, steps = history.task_loss(last=2 * self.window), history.steps(last=2 * self.window)
        steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
        bound = self._bound(history, losses)
        since = _since(losses, bound)
        before = median(losses[:since])
        return {
            "loss": median(losses[-self.window :]),
            "before": before,
            "bound": bound,
            "high since": float(steps[since]),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss, before, bound = (alarm.numbers[name] for name in ("loss", "before", "bound"))
        level, limit = apart(loss, bound)
        since = f"since about step {alarm.numbers['high since']:.0f}, up to step {alarm.step}"
        return (
            f"the loss has been about {level} {since}, and about {number(before)} before; above {limit}, it is back by more than "
            "half of the orders of magnitude that it had fallen by"
        )


def _since(losses: Floats, bound: float) -> int:
    """Return the place that parts losses best into those up to ``bound`` and those above it."""
    return int(np.argmax(np.cumsum(np.where(losses > bound, -1, 1)))) + 1
