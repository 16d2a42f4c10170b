"""GW103: the loss becomes NaN or infinite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class LossNonFinite(Rule):
    """The loss goes NaN (or infinite) during training.

    ## What it means
    The loss of this step is not a finite number, so its gradients are meaningless.

    ## Formula
    `value = 1` if a loss was seen and is NaN or infinite, else `0`. It fires where `value > limit` (0).

    ## Why it is bad
    The next update writes NaN into the weights, and from then on the run is lost.

    ## What to do
    The incident says whether the weights, the gradients or the loss became non-finite first. If the loss did, look for the
    logarithm or square root of zero, a division by zero, exp of a large number, or NaN in the data. If the gradients did,
    clip or lower the learning rate. `clip="norm"` skips such steps.

    ## When it is harmless
    Occasionally under float16 with a GradScaler, which finds its scale by overflowing.

    ## Source
    The third of the practitioners' signs (Brownlee 2019).
    """

    code: ClassVar[str] = "GW103"
    name: ClassVar[str] = "loss not finite"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "nonfinite"
    per_layer: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("NaN after five steps", fires=5, loss="1x5 nan"),
        Case("infinite", fires=2, loss="1x2 inf"),
        Case("very large is still finite", fires=None, loss="1*1e30x3"),
    )

    def measure(self, history: History) -> Floats:
        """Return 1.0 if the loss is not finite, else 0.0, shape (1,)."""
        return np.array([float(history.loss_nonfinite)])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {"loss": history.row.loss}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss = alarm.numbers["loss"]
        what = "NaN" if math.isnan(loss) else "infinite" if loss > 0 else "minus infinity"
        return f"the loss was {what} at step {alarm.step}"
