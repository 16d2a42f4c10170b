"""GW104: the loss runs away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign


_ON_ITS_WAY = 1.5  # times the level before
_DOWNWARDS = 40.0  # times as far must a loss run downwards


class LossRunaway(Rule):
    """The loss runs away: it has become many times as large as it was, upwards or downwards.

    ## What it means
    The loss lies far beyond everything of the run's beginning, and came there without a jump that would tell.

    ## Formula
    `value = m / max |x_k|` upwards, `-m / max |x_k| / 40` downwards, with `m` the median of the last 8 losses and `x_k` the
    first 16 finite ones, and those of jumps that the last update cannot have made (the task became harder); `0` where it is
    no longer on its way: `|m|` below 1.5 times the median of the 32 losses before. It fires where `value > limit` (2.5) for
    `for_steps` (3) steps: at 2.5 times upwards, and at 100 times downwards, for a loss that may be negative has no natural
    floor.

    ## Why it is bad
    Slow divergence raises the run's own level along with it, so that no single step stands out. Downwards it is a loss
    without a floor: a wrong sign, or a likelihood whose variance goes to zero.

    ## What to do
    Look at the sign of the loss and of its parts; give the variance a floor; lower the learning rate; clip by norm.

    ## When it is harmless
    A loss that begins at almost nothing and whose level has no meaning, as that of an adversary; a harder task.

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
    for_steps: int = Field(default=3, ge=1)

    def measure(self, history: History) -> Floats:
        """Return the loss's size over its largest of the beginning, shape (1,); NaN before 16 finite losses."""
        beginning = history.largest_first_loss
        now, _ = median_and_mad(history.task_loss(last=8))
        before, _ = median_and_mad(history.task_loss(last=40)[:-8])
        if abs(now) < _ON_ITS_WAY * abs(before):
            return np.zeros(1)
        return np.array([max(now, -now / _DOWNWARDS) / beginning if beginning > 0 else np.nan])
