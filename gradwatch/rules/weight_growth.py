"""GW201: the weights quickly become very large."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class WeightGrowth(Rule):
    """The weights quickly become very large during training.

    ## What it means
    A layer's weight norm is several times the norm it had a short while ago.

    ## Formula
    `value = ||w|| / max(t, f)`, where `t` is the layer's typical weight norm (an exponential average of log norms with a
    half-life of 16 samples, starting at the first norm) and `f = c * sqrt(n)` a floor for `n` elements: `c = 0.01` for
    matrices, `c = 1` for biases and gains, which may grow from zero. It fires where `value > limit` (5).

    ## Why it is bad
    Healthy weights grow by a few per cent. Large weights produce larger activations and larger gradients, which produce
    larger weights, until they overflow.

    ## What to do
    Clip by norm, lower the learning rate, scale the targets, or put an L2 penalty on the weights.

    ## When it is harmless
    Layers that were initialised almost at zero, such as the second factor of an adapter.

    ## Source
    The first of the practitioners' confirming signs (Brownlee 2019).
    """

    code: ClassVar[str] = "GW201"
    name: ClassVar[str] = "weights quickly very large"
    sign: ClassVar[Sign] = "confirming"
    kind: ClassVar[Kind] = "exploding"
    role: ClassVar[Role] = "damage"
    remedy: ClassVar[str] = "Put an L2 penalty on the weights."
    opens: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("doubles each step", fires=4, weight="1*2x8"),
        Case("grows by one per cent a step", fires=None, weight="1*1.01x300"),
        Case("a bias leaves zero", fires=None, weight="0.001 0.01 0.05 0.09"),
    )

    limit: float = Field(default=5.0, gt=1)

    def measure(self, history: History) -> Floats:
        """Return the weight norm of each layer over its typical norm, shape (L,); NaN before the second sample."""
        floor = np.sqrt(history.sizes) * np.where(history.matrices, 0.01, 1.0)
        value: Floats = history.weight / np.maximum(history.typical_weight.value, floor)
        return value

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        floor = np.sqrt(history.sizes[column]) * (0.01 if history.matrices[column] else 1.0)
        return {"norm": history.weight[column], "usual": history.typical_weight.value[column], "floor": floor}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        norm, usual, floor = (alarm.numbers[name] for name in ("norm", "usual", "floor"))
        begin = f"the weight norm of {alarm.layer} was {number(norm)} at step {alarm.step}"
        if not math.isfinite(norm):
            return f"{begin}, where it is usually {number(usual)}"
        times, limit = apart(alarm.value, alarm.limit)
        if usual >= floor:
            return f"{begin}, {times} times its usual {number(usual)} (limit {limit})"
        least = f"the least that counts for its size, {number(floor)}"
        return f"{begin}, where it is usually {number(usual)}: {times} times {least} (limit {limit})"
