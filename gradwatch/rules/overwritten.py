"""GW406: each update overwrites much of the weights, and the loss hangs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.ending import hangs
from gradwatch.history.statistics import median
from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.rules.update_too_large import RATE_SIZED
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign

LARGE_EPS = 1e-2  # beyond which next to nothing is left of most updates


class Overwritten(Rule):
    """Each update overwrites much of the weights, and the loss hangs.

    ## What it means
    The learning rate, or the weight decay, is so high that within a few steps the weights are no longer those that were
    learned, and training makes no progress.

    ## Formula
    `value` is the median of `lr sqrt(n) / max(||w||, 0.5 * sqrt(n / f)) + lr d` over the matrices with `n >= 16` elements,
    `f` inputs and a learning rate above zero, with the weight decay `d` where it is decoupled from the gradient, as in AdamW:
    the share of its weights by which Adam, AdamW, NAdam, Adamax or RMSprop may change a layer in one step; the floor is half
    of a usual initialisation. It is `0` for other optimizers, with an eps above 0.01, which makes updates far shorter, while
    the learning rate reached its highest value within the last 50 rows, and unless the loss hangs: at least 100 losses were
    seen and the loss is stuck (improved by less than a tenth) or where it began, or of 200 losses or more it is above its
    best level by a quarter of what it had fallen, or above 60 % of where it began and has hardly fallen for two thirds of the
    run. It fires where `value > limit` (0.1).

    ## Why it is bad
    An update should correct the weights and not replace them. At a tenth of the weights per step, little is left of what was
    learned twenty steps ago.

    ## What to do
    Lower the learning rate, or warm it up; lower the weight decay if it is what takes the weights away.

    ## When it is harmless
    A plateau that a smaller rate would not leave either.

    ## Source
    The ratio of updates to weights should be about 1e-3: Karpathy, CS231n notes, "Ratio of weights:updates". Decoupled weight
    decay takes the share `lr d` at each step: Loshchilov & Hutter, "Decoupled weight decay regularization" (2019).
    """

    code: ClassVar[str] = "GW406"
    name: ClassVar[str] = "weights overwritten"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "stalled"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("Adam at a high rate", fires=99, loss="2.3x150", weight="2x150", rate=0.05, family="adam"),
        Case("and the loss falls", fires=None, loss="2.3*0.99x150", weight="2x150", rate=0.05, family="adam"),
        Case("at a usual rate", fires=None, loss="2.3x150", weight="2x150", rate=0.001, family="adam"),
        Case("SGD: the update is known by its gradient", fires=None, loss="2.3x150", weight="2x150", rate=0.05),
    )

    limit: float = Field(default=0.1, gt=0)
    keep_steps: int = Field(default=20, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the share of its weights by which an update may change the middle matrix, shape (1,); 0 if the loss falls."""
        update, decay = self._shares(history)
        share = update + decay
        if history.facts.option("eps") > LARGE_EPS:  # which makes each update far shorter than the rate
            return np.zeros(1)
        return np.array([share if share > self.limit and not history.warming_up and hangs(history) else 0.0])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        update, decay = self._shares(history)
        return {"update": update, "decay": decay, "rate": history.facts.rate} | stuck_at(history)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        update, decay, rate = (alarm.numbers[name] for name in ("update", "decay", "rate"))
        share, limit = apart(100 * alarm.value, 100 * alarm.limit)
        by = f", {number(100 * decay)} % of them by weight decay" if decay > update / 10 else ""
        return (
            f"at its learning rate of {number(rate)}, one update may change the middle matrix by {share} % of its weights{by} "
            f"at step {alarm.step} (limit {limit} %), and {in_words(alarm)}"
        )

    @staticmethod
    def _shares(history: History) -> tuple[float, float]:
        """Return by which shares of its weights an update and the weight decay may change the middle matrix; 0 if unknown."""
        if history.facts.optimizer not in RATE_SIZED:
            return 0.0, 0.0
        shares = history.rate * np.sqrt(history.sizes) / np.maximum(history.weight, history.half_usual)
        shares = shares[history.large_matrices & (history.rate > 0) & np.isfinite(shares)]
        if not shares.size:
            return 0.0, 0.0
        decay = history.facts.decay * history.facts.rate
        return median(shares), decay if math.isfinite(decay) else 0.0
