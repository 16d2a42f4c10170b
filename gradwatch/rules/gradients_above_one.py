"""GW203: the gradients are consistently above 1.0 for each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class GradientsAboveOne(Rule):
    """The gradients are consistently above 1.0 for each layer during training.

    ## What it means
    The gradient norm of every layer that received a gradient was above the limit, several steps in a row.

    ## Formula
    `value = min over layers of ||g_l||`, where `g_l` is the gradient of layer `l`; a norm that is not finite counts as
    infinite. It fires where `value > limit` (1.0) for `for_steps` (3) steps in a row.

    ## Why it is bad
    Together with a jump of the loss or a surge of the norm, it confirms that the whole model is affected and not a single
    layer.

    ## What to do
    Follow the advice of the incident that it confirms. By itself it requires no action.

    ## When it is harmless
    By itself: summed losses, unscaled targets and wide layers give large, stable gradients in healthy runs. It therefore
    never opens an incident by itself.

    ## Source
    The third of the practitioners' confirming signs (Brownlee 2019). By itself it fires in 22 of 70 healthy runs of a
    pilot study, which is not part of the repository.
    """

    code: ClassVar[str] = "GW203"
    name: ClassVar[str] = "gradients above 1.0 in each layer"
    sign: ClassVar[Sign] = "confirming"
    kind: ClassVar[Kind] = "exploding"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("both layers, three steps", fires=2, grad={"a": "2x5", "b": "30x5"}),
        Case("one layer stays small", fires=None, grad={"a": "2x50", "b": "0.9x50"}),
        Case("not three in a row", fires=None, grad={"a": "2 2 0.5 2 2 0.5", "b": "9x6"}),
        Case("NaN counts as large", fires=2, grad={"a": "nanx5", "b": "infx5"}),
    )

    limit: float = Field(default=1.0, gt=0)
    for_steps: int = Field(default=3, ge=1)

    def measure(self, history: History) -> Floats:
        """Return the smallest gradient norm among layers with a gradient, shape (1,)."""
        norms = np.where(history.nonfinite > 0, np.inf, history.row.grad_norm)
        norms[history.sizes == 0] = np.nan  # a layer without elements has a norm of zero whatever happens
        smallest = np.fmin.reduce(norms, initial=np.nan)
        return np.array([smallest])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        known = (np.isfinite(history.row.grad_norm) | (history.nonfinite > 0)) & (history.sizes > 0)
        finite = np.isfinite(history.global_norm(last=self.for_steps)).all()
        return {"layers": float(np.count_nonzero(known)), "always finite": float(finite)}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        layers, (least, limit) = alarm.numbers["layers"], apart(alarm.value, alarm.limit)
        whose = f"each of the {layers:.0f} layers with a gradient" if layers > 1 else "the only layer with a gradient"
        over = f"above {limit}" if alarm.numbers["always finite"] else f"above {limit} or not finite"
        steps = f"at step {alarm.step}" + (f", the last of {self.for_steps} in a row" if self.for_steps > 1 else "")
        there = f"the smallest was {least}" if math.isfinite(alarm.value) else "none was finite"
        return f"the gradient norm of {whose} was {over} {steps}, where {there}"
