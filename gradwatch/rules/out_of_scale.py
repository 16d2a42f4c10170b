"""GW404: the weights of one layer are out of scale, and the loss hangs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.ending import hangs
from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class OutOfScale(Rule):
    """The weights of one layer are far larger than those of the others, and the loss hangs.

    ## What it means
    This layer multiplies its input by a much larger factor than the others do, so its output dominates theirs, and training
    makes no progress.

    ## Formula
    `value = a / max(median(a), 0.5)` with the gain `a = ||w|| sqrt(f / n)` of a matrix with `n >= 16` elements and `f`
    inputs (1 for an embedding, which is a lookup), over at least three matrices. `value = 0` unless the loss
    hangs (see GW406: it is stuck, stands far above its best level, or is high and has hardly fallen for long), and while the
    learning rate reached its highest value within the last 50 rows. It fires where `value > limit` (10).

    ## Why it is bad
    Optimizers move all layers by similar amounts, so a layer that starts a hundred times too large stays too large for
    thousands of steps.

    ## What to do
    Check the initialisation of this layer (embeddings in particular), a checkpoint loaded into it, and a factor in the
    forward pass that was meant to go with it. Add a normalisation after it.

    ## When it is harmless
    Where the next operation divides by the size again, as a normalisation does.

    ## Source
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010): gains near 1.
    """

    code: ClassVar[str] = "GW404"
    name: ClassVar[str] = "weights out of scale"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "stalled"
    remedy: ClassVar[str] = (
        "Check the initialisation of {suspect}: its weights are far larger than those of other layers."
    )
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("one of three", fires=99, weight={"a": "300x120", "b": "3x120", "c": "3x120"}),
        Case("and the loss falls", fires=None, loss="1*0.99x120", weight={"a": "300x120", "b": "3x120", "c": "3x120"}),
        Case("all alike", fires=None, weight={"a": "300x120", "b": "300x120", "c": "300x120"}),
    )

    limit: float = Field(default=10.0, gt=1)

    def measure(self, history: History) -> Floats:
        """Return the gain of each matrix relative to the median gain, shape (L,); NaN for layers that have none."""
        if not history.warming_up:
            gain = history.relative_gain()
            if (gain > self.limit).any() and hangs(history):
                return gain
        return np.zeros(len(history.layers))

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        gain = history.weight[column] * math.sqrt(history.fan_in[column] / history.sizes[column])
        return {"gain": gain} | stuck_at(history)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        gain = alarm.numbers["gain"]
        if not math.isfinite(gain):
            return f"the weights of {alarm.layer} were infinite at step {alarm.step}, and {in_words(alarm)}"
        times, limit = apart(alarm.value, alarm.limit)
        base = "those of the median layer" if gain / alarm.value > 0.5 else "half of a usual initialisation"
        return (
            f"the weights of {alarm.layer} were, for their number of inputs, {times} times as large as {base} at step "
            f"{alarm.step} (limit {limit}), and {in_words(alarm)}"
        )
