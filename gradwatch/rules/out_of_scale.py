"""GW404: one layer's weights are out of scale, and the loss is stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign


class OutOfScale(Rule):
    """One layer's weights are out of scale beside the others', and the loss is stuck.

    ## What it means
    What passes this layer is multiplied by many times as much as in the others, so that it drowns them, and training
    gets nowhere.

    ## Formula
    `value = a / max(median(a), 0.5)` with the gain `a = ||w|| sqrt(f / n)` of a matrix with `n >= 16` elements and `f`
    inputs (1 for an embedding, which is looked up), over at least three matrices; `0` while the loss is not stuck (100
    steps and less than a tenth gained) or the rate still rises. It fires where `value > limit` (10).

    ## Why it is bad
    Optimizers move all layers by similar amounts: a layer that begins a hundred times too large stays so for thousands
    of steps.

    ## What to do
    Look at the initialisation of this layer (embeddings most of all), at a checkpoint loaded into it, and at a factor in
    the forward pass that was meant to go with it; put a normalisation behind it.

    ## When it is harmless
    Where the next operation divides by the size again, as a normalisation does.

    ## Source
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010): gains near 1.
    """

    code: ClassVar[str] = "GW404"
    name: ClassVar[str] = "weights out of scale"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "stalled"
    remedy: ClassVar[str] = "Look at how {suspect} begins: its weights are far larger than the other layers'."
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("one of three", fires=99, weight={"a": "300x120", "b": "3x120", "c": "3x120"}),
        Case("and the loss falls", fires=None, loss="1*0.99x120", weight={"a": "300x120", "b": "3x120", "c": "3x120"}),
        Case("all alike", fires=None, weight={"a": "300x120", "b": "300x120", "c": "300x120"}),
    )

    limit: float = Field(default=10.0, gt=1)

    def measure(self, history: History) -> Floats:
        """Return each matrix's gain over the others', shape (L,)."""
        return history.relative_gain() if history.stuck and not history.warming_up else np.zeros(len(history.layers))
