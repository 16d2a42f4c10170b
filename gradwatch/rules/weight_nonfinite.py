"""GW202: the weights become NaN or infinite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class WeightNonFinite(Rule):
    """The weights go NaN (or infinite) during training.

    ## What it means
    A layer holds at least one weight that is not a finite number.

    ## Formula
    `value = 1` where the layer's weight norm is not finite, else `0`. It fires where `value > limit` (0). Weights are
    measured at each of the first steps, at each step of an open explosion, and every 16 steps otherwise (every 32 after 512).

    ## Why it is bad
    Every later output of this layer is NaN, and no update can repair it.

    ## What to do
    Go back to the last checkpoint with finite weights, and lower the learning rate or clip. If it happens at step 0, the
    checkpoint or the initialisation is broken.

    ## When it is harmless
    Never.

    ## Source
    The second of the practitioners' confirming signs (Brownlee 2019).
    """

    code: ClassVar[str] = "GW202"
    name: ClassVar[str] = "weights not finite"
    sign: ClassVar[Sign] = "confirming"
    kind: ClassVar[Kind] = "nonfinite"
    role: ClassVar[Role] = "damage"
    cases: ClassVar[tuple[Case, ...]] = (
        Case("NaN at step 3", fires=3, weight="1x3 nan"),
        Case("large is still finite", fires=None, weight="1 1e30"),
    )

    def measure(self, history: History) -> Floats:
        """Return 1.0 where the weights of a layer are not finite, else 0.0, shape (L,)."""
        return history.nonfinite_weight.astype(float)

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {"norm": history.weight[column]}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        what = "NaN" if math.isnan(alarm.numbers["norm"]) else "infinite values"
        return f"{alarm.layer} held {what} at step {alarm.step}"
