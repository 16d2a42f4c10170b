"""GW104: the loss runs away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign

_DOWN = 1.02  # multiple of a loss below zero of 128 steps before beyond which it still runs down


class LossRunaway(Rule):
    """The loss runs away: it has become many times as large as it was, upwards or downwards.

    ## What it means
    The loss is far beyond all losses at the beginning of the run, and it got there without a single conspicuous jump.

    ## Formula
    `value = m / max |x_k|` upwards and `value = -m / max |x_k| / downwards` (40) downwards, where `m` is the median of the
    last 8 losses. `x_k` are the first 16 finite losses, and losses after jumps that the last update cannot have caused (the
    task became harder). `value = 0` when the loss no longer moves away: `|m|` is below `moving` (1.5) times the absolute
    median of the 32 losses before; for a cross-entropy above `worse` (2.0) times that of guessing, which no plateau explains, of
    the 32 losses 128 steps before; downwards, below 1.02 times that of those. `value` is infinite for a cross-entropy below zero,
    which is none. It fires where
    `value > limit` (2.5) for `for_steps` (3) steps: at 2.5 times the beginning upwards, and at 100 times downwards, because a
    loss that may be negative has no natural floor.

    ## Why it is bad
    Slow divergence raises the run's own level too, so no single step stands out. A loss that runs downwards has no floor:
    its sign is wrong, or it is a likelihood whose variance goes to zero.

    ## What to do
    Check the sign of the loss and of its terms. Give the variance a floor. Lower the learning rate. Clip by norm.

    ## When it is harmless
    A loss that starts near zero and whose level has no meaning, such as an adversarial loss; a harder task.

    ## Source
    Megatron-LM calls ten times the largest of the first 100 losses a spike.
    """

    code: ClassVar[str] = "GW104"
    name: ClassVar[str] = "loss runs away"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "diverging"
    per_layer: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("grows a little on each step", fires=45, loss="1x20 1*1.05x200"),
        Case("a wrong sign", fires=74, loss="-1x20 -1*1.1x100"),
        Case("starts at 1e4 and falls", fires=None, loss="1e4*0.9x200"),
        Case("falls below zero", fires=None, loss="3+-0.1x100"),
        Case("three high losses", fires=None, loss="1x40 9x3 1x40"),
    )

    limit: float = Field(default=2.5, gt=1)
    moving: float = Field(default=1.5, ge=1)
    downwards: float = Field(default=40.0, ge=1)
    worse: float = Field(default=2.0, ge=1)
    for_steps: int = Field(default=3, ge=1)

    def measure(self, history: History) -> Floats:
        """Return the loss over the largest loss at the beginning, shape (1,); NaN or 0 before 16 finite losses."""
        beginning = history.largest_first_loss
        now, _ = median_and_mad(history.task_loss(last=8))
        down = now < 0
        slow = down or now > self.worse * history.guessing  # a cross-entropy, whose scale is known
        before, _ = median_and_mad(history.task_loss(last=136 if slow else 40)[:-8][:32])
        if history.need_not_fall:
            return np.zeros(1)
        if history.is_no_entropy and down:
            return np.array([np.inf])
        if abs(now) < (_DOWN if down else self.moving) * abs(before):  # what has no floor may run slower and slower
            return np.zeros(1)
        return np.array([max(now, -now / self.downwards) / beginning if beginning > 0 else np.nan])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {
            "loss": median_and_mad(history.task_loss(last=8))[0],
            "largest": history.largest_first_loss,
            "harder": float(history.became_harder),
            "no entropy": float(history.is_no_entropy),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss, largest = alarm.numbers["loss"], alarm.numbers["largest"]
        if alarm.numbers.get("no entropy"):
            return f"the cross-entropy was about {number(loss)} by step {alarm.step}, and no cross-entropy can be below zero"
        way, limit = ("up", alarm.limit) if loss > 0 else ("down", alarm.limit * self.downwards)
        times, most = apart(abs(loss) / largest, limit)
        size = "" if loss > 0 else "the size of "
        whose = "to which it had jumped before" if alarm.numbers.get("harder") else "of its beginning"
        return (
            f"the loss ran {way} to about {number(loss)} by step {alarm.step}, {times} times {size}the largest loss {whose} "
            f"({number(largest)}; limit {most})"
        )
