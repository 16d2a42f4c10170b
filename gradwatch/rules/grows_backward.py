"""GW306: gradients grow on their way back through the layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class GrowsBackward(Rule):
    """Gradients grow on their way back through the layers, while the loss is stuck.

    ## What it means
    A layer's gradient elements are orders of magnitude larger than those of a layer nearer to the loss.

    ## Formula
    `value = rms_l / min_k(rms_k)` over the layers `k` that are nearer to the loss than layer `l`, with `rms_l = t_l / sqrt(n_l)`,
    `t_l` the typical gradient norm of layer `l` and `n_l` its number of elements. Those are left out whose elements are smaller
    than those of one nearer still by more than the root of the limit: a branch that begins near zero, such as a LoRA or a
    LayerScale, which other gradients pass by. It is 0 unless the loss is stuck (at least
    100 losses, improved by less than a tenth). It fires where `value > limit` (1000) for `for_steps` (32) steps. Only matrices
    are considered, and of them those with a gradient.

    ## Why it is bad
    The weights of the layers in between multiply what comes back. Whatever length a clip gives the step, it moves the first
    layers alone, and no learning rate suits all layers.

    ## What to do
    Initialise the layers in between smaller (their gain is above one), add normalisation, or use fewer layers.

    ## When it is harmless
    Inputs of very different scale than the hidden units make the first layer's gradient large by themselves: scale them.

    ## Source
    Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), arXiv:1211.5063; Philipp et al., "The
    exploding gradient problem demystified" (2017), arXiv:1712.05577.
    """

    code: ClassVar[str] = "GW306"
    name: ClassVar[str] = "gradients grow on the way back"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    urgent: ClassVar[bool] = False
    role: ClassVar[Role] = "backward"
    remedy: ClassVar[str] = (
        "Initialise the layers behind {suspect} smaller, or add normalisation: their gain multiplies what comes back."
    )
    cases: ClassVar[tuple[Case, ...]] = (
        Case("four decades larger, loss stuck", fires=130, grad={"first": "10x160", "last": "1e-3x160"}, loss="2x160"),
        Case(
            "four decades larger, loss falls",
            fires=None,
            grad={"first": "10x160", "last": "1e-3x160"},
            loss="2*0.98x160",
        ),
        Case("four decades smaller", fires=None, grad={"first": "1e-3x160", "last": "10x160"}, loss="2x160"),
    )

    limit: float = Field(default=1e3, gt=1)
    for_steps: int = Field(default=32, ge=1)
    keep_steps: int = Field(default=32, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the typical gradient element of each layer over the smallest nearer to the loss, shape (L,); 0 unless stuck."""
        if not history.stuck:
            return np.zeros(len(history.layers))
        rms = history.typical_elements()
        return rms / self._least_before(rms, history)

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        rms = history.typical_elements()
        return {"element": rms[column], "least": self._least_before(rms, history)[column]} | stuck_at(history)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        element, least = alarm.numbers["element"], alarm.numbers["least"]
        times, limit = apart(element / least, alarm.limit)
        return (
            f"the gradient of {alarm.layer} was usually {number(element)} per element by step {alarm.step}, {times} times larger "
            f"than that of a layer nearer to the loss ({number(least)}; limit {limit}), and {in_words(alarm)}"
        )

    def _least_before(self, rms: Floats, history: History) -> Floats:
        """Return the smallest element of the layers whose gradients arrive before that of each layer, itself included, (L,)."""
        order = np.argsort(history.order)
        chain = rms[order]
        in_line = chain >= np.fmax.accumulate(chain) / math.sqrt(self.limit)
        least: Floats = np.empty(len(rms))
        least[order] = np.fmin.accumulate(np.where(in_line, chain, np.nan))
        return least
