"""GW304: weights grow while the loss does not fall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.history import RECENT
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, counted, number, percent

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class WeightsRunAway(Rule):
    """Weights grow while the loss does not fall.

    ## What it means
    Within the last hundred rows a layer's weight norm has become several times as large, and the loss has not improved
    to match.

    ## Formula
    `value = ||w|| / max(min ||w_k||, 0.5 * sqrt(n / f))`, where `min ||w_k||` is the smallest weight norm of the last 100
    rows (one row per measured step), for matrices with `n >= 16` elements and `f` inputs. The second term is half of a
    usual initialisation, for layers that start near zero. If the median of the last 16 losses is at least `progress` (0.2)
    of the reference loss below it, the run makes progress and only `share` (0.4) of the growth counts. It fires where
    `value > limit` (4): growth by a factor of 4 without progress, of 10 with progress.

    ## Why it is bad
    It is a slow explosion: the steps are too large for the weights to settle, so the weights keep growing.

    ## What to do
    Lower the learning rate or warm it up. Look for a missing `zero_grad()` and for a weight decay of the wrong sign. Add
    weight decay.

    ## When it is harmless
    A last layer that starts at zero and has to become large, as in a regression on large targets.

    ## Source
    Weight norms above ten times the first norm detected 25 of 25 explosions, and none of 70 healthy runs, in a pilot
    study, which is not part of the repository.
    """

    code: ClassVar[str] = "GW304"
    name: ClassVar[str] = "weights run away"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("five per cent a step, and a loss that stays", fires=29, weight="2*1.05x80"),
        Case("the same growth, and a loss that falls", fires=None, weight="2*1.05x40", loss="1*0.97x40"),
        Case("large, and stays", fires=None, weight="1e4x80"),
        Case("leaves zero", fires=None, weight="0+0.1x50"),
    )

    limit: float = Field(default=4.0, gt=1)
    progress: float = Field(default=0.2, gt=0)
    share: float = Field(default=0.4, gt=0, le=1)

    def measure(self, history: History) -> Floats:
        """Return the growth of each matrix within 100 rows, shape (L,); NaN for biases and before the sixteenth loss."""
        growth = history.weight / np.maximum(history.least_weight, history.half_usual)
        if history.losses < 16:
            return np.full(len(growth), np.nan)
        return np.where(
            history.large_matrices, growth * self.share if history.gained(self.progress) else growth, np.nan
        )

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {
            "norm": history.weight[column],
            "least": history.least_weight[column],
            "floor": history.half_usual[column],
            "progress": history.gained(self.progress),
            "rows": float(min(history.task_rows, RECENT)),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        norm, least, floor = (alarm.numbers[name] for name in ("norm", "least", "floor"))
        begin = f"the weight norm of {alarm.layer} grew to {number(norm)} by step {alarm.step}"
        if not math.isfinite(norm):
            return f"{begin}, from {number(least)} at most 100 measured steps before"
        unless, share = ("while", self.share) if alarm.numbers["progress"] else ("unless", 1.0)
        times, limit = apart(norm / max(least, floor), alarm.limit / share)
        rows = counted(alarm.numbers.get("rows", RECENT), "measured step")
        base = f"its smallest in {rows}" if least >= floor else "half of a usual initialisation"
        return (
            f"{begin}, {times} times {base}, {number(max(least, floor))} (limit {limit} {unless} the median of 16 losses is "
            f"{percent(self.progress)} below the beginning)"
        )
