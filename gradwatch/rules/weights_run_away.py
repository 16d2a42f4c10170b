"""GW304: weights grow while the loss does not fall."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign

_PROGRESS = 0.2  # of the reference loss, gained
_SHARE = 0.4  # of the growth counts where there is progress


class WeightsRunAway(Rule):
    """Weights grow while the loss does not fall.

    ## What it means
    A layer's weight norm is several times what it was at most a hundred rows ago, and the training has nothing to show
    for it.

    ## Formula
    `value = ||w|| / max(min ||w_k||, 0.5 * sqrt(n / f))`, with the least weight norm of the last 100 rows (steps, where
    each is measured), for matrices of `n >= 16` elements and `f` inputs (half of a usual initialisation, for layers that
    start near zero). Where the median of the last 16 losses lies a fifth of the reference loss below it, there is
    progress, and only 0.4 of the value counts. It fires where `value > limit` (4): growth by 4 without progress, by 10
    with it.

    ## Why it is bad
    It is an explosion in slow motion: steps are too large to settle, so the weights walk away instead.

    ## What to do
    Lower the learning rate or warm it up, look for a `zero_grad()` that is missing and for a weight decay of the wrong
    sign; add weight decay.

    ## When it is harmless
    A last layer that starts at zero and has to become large, as in a regression on large targets.

    ## Source
    Weight norms above ten times the first told 25 of 25 explosions and no healthy run of 70 in the pilot study of the
    project's notes on detection.
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

    def measure(self, history: History) -> Floats:
        """Return each matrix's growth within 100 rows, shape (L,); NaN for biases and before the sixteenth loss."""
        growth = history.weight / np.maximum(history.least_weight, history.half_usual)
        if history.losses < 16:
            return np.full(len(growth), np.nan)
        return np.where(history.telling, growth * _SHARE if history.gained(_PROGRESS) else growth, np.nan)
