"""GW102: the loss changes greatly from update to update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.recurrence import jump_scale
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class LossJump(Rule):
    """The loss changes greatly from update to update: it jumped up.

    ## What it means
    The last loss is far above the losses just before it, relative to how much they usually vary.

    ## Formula
    `value = (x - m) / s`, where `x` is the last loss, and `m` and `d` are the median and the scaled MAD of up to 32 losses
    before it. The scale is `s = max(d, |m| / 10, |r| / 20, (h - m) / 5)`, where `r` is the reference loss (median of the
    first 16) and `h` the highest of the losses before, or the third-highest peak of all excursions of the loss that came back
    (those of destructive explosions left out), if that is higher. It fires where `value > limit` (10). The loss has then at
    least doubled, has risen by at least half of the reference loss, and has risen twice as far as at any of the 32 steps
    before and as it repeatedly does. The ordinary noise of a converged run and batches with a rare class therefore stay
    below. Falls never count.

    ## Why it is bad
    One update did more harm than many updates did good: the step was too long for the local curvature, or the batch was
    faulty. It is often the last sign before the loss turns NaN.

    ## What to do
    After a single jump that came back, look at that batch. If jumps recur or grow, lower the learning rate, add warm-up,
    scale the targets, or clip by norm.

    ## When it is harmless
    One hard batch; a warm restart of the learning rate; a new stage of a curriculum.

    ## Source
    The second of the practitioners' signs (Brownlee 2019); scaling by median and MAD follows Leys et al. (2013).
    """

    code: ClassVar[str] = "GW102"
    name: ClassVar[str] = "loss jumps"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "spike"
    role: ClassVar[Role] = "jump"
    per_layer: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("one jump", fires=20, loss="1+0.01x20 50 1"),
        Case("explodes from the start", fires=3, loss="1 1.1 2 40 900"),
        Case("noise of a converged run", fires=None, loss="2.3x20 0.01x40 0.3 0.01x10"),
        Case("starts at 1e4 and falls", fires=None, loss="1e4*0.5x30"),
    )

    limit: float = Field(default=10.0, gt=0)
    window: int = Field(default=32, ge=4)

    def measure(self, history: History) -> Floats:
        """Return the last loss's distance from the median in units of ``s``, shape (1,); NaN before the fourth loss."""
        middle, scale = jump_scale(history, self.window, recurring=False)
        if history.losses < 4 or math.isnan(middle) or not math.isfinite(history.row.loss):
            return np.array([np.nan])
        if history.row.loss - middle > self.limit * scale:  # the lookup is expensive, so only where the rule would fire
            middle, scale = jump_scale(history, self.window, recurring=True)
        return np.array([(history.row.loss - middle) / scale if scale else np.nan])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {"loss": history.row.loss, "usual": history.loss_level(self.window)[0]}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss, usual = alarm.numbers["loss"], alarm.numbers["usual"]
        jump, limit = apart(loss, usual + alarm.limit * (loss - usual) / alarm.value)
        return f"the loss jumped to {jump} at step {alarm.step}, from about {number(usual)} before; above {limit} is a jump"
