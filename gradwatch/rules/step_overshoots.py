"""GW305: the step overshoots: its predicted decrease is larger than the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.recurrence import usual_norms
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class StepOvershoots(Rule):
    """The step overshoots: its predicted decrease of the loss is larger than the loss itself.

    ## What it means
    To first order, an SGD step lowers the loss by `lr ||g||^2`. If that is several times the whole loss, the step leaves the
    region in which the gradient is informative. The rule needs no history, so it works before the first update.

    ## Formula
    `value = sum_l lr_l (c ||g_l|| / max(1, p_l / 2t_l))^2 / max(L, |r| / 10)` over the layers `l`, with learning rate `lr`,
    the factor `c` of the user's own clipping, the loss `L` that the gradients came from and the reference loss `r` (median of
    the first 16), which bounds the denominator because a task that is nearly learned may be overshot. `t` is a layer's typical
    gradient norm and `p` the third-highest peak of the excursions above `2t` that came back, as in GW301: a step that overshoots
    the loss of one batch of a rare class does not overshoot that of the run, so once such batches recur, a gradient of their
    size counts as a usual one. The alarm names the layer with the largest term.
    It fires where `value > limit` (8.0). For a quadratic loss whose minimum is zero or higher, `||g||^2 <= 2 h L` with
    the largest curvature `h`, so a value above 8 proves `lr h > 4`. Gradient descent diverges beyond 2, with momentum `m`
    beyond `2 (1 + m)`, hence beyond 4 for any momentum. The rule does not apply to other optimizers, nor if no loss was seen,
    if the loss was passed to `monitor.loss()` and may not be what was differentiated, or if one of the losses kept was below
    zero, because zero is then no lower bound.

    ## Why it is bad
    A step that goes this far past the minimum ends higher than it began, and the next gradient is even larger.

    ## What to do
    Clip by norm, or divide the learning rate by half of the value. Check the scale of the loss (a sum instead of a mean),
    of the targets and of the initial weights.

    ## When it is harmless
    A batch of a single unusual example; a loss with kinks, such as a hinge, near its end. The incident opens only in the
    first 12 steps or while the loss rises.

    ## Source
    The largest step that Polyak's rule allows is `lr = (L - L*) / (c ||g||^2)` with c = 1/2, a value of 2 (Loizou et al.
    2021, "Stochastic Polyak step-size for SGD"); gradient descent is stable at `lr h < 2`, with momentum
    at `lr h < 2 (1 + m)`, and training settles near that edge: Cohen et al. 2021, "Gradient descent on neural networks
    typically occurs at the edge of stability".
    """

    code: ClassVar[str] = "GW305"
    name: ClassVar[str] = "step overshoots the loss"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    role: ClassVar[Role] = "overshoot"
    cases: ClassVar[tuple[Case, ...]] = (
        Case("before the first update", fires=0, grad="50x3", loss="2x3", rate=0.01),
        Case("the same beside a larger loss", fires=None, grad="50x3", loss="20x3", rate=0.01),
        Case("the user's clip leaves little", fires=None, grad="50x3", loss="2x3", clip="0.1", rate=0.01),
        Case("nearly learned", fires=None, grad="1x60", loss="2*0.9x60", rate=0.1),
        Case("a loss below zero has no floor", fires=None, grad="50x3", loss="-2x3", rate=0.01),
        Case("Adam normalises its gradients", fires=None, grad="50x3", loss="2x3", rate=0.01, family="adam"),
    )

    limit: float = Field(default=8.0, gt=0)

    def measure(self, history: History) -> Floats:
        """Return the value in the column of the layer with the largest term, shape (L,); NaN in all others."""
        value = np.full(len(history.layers), np.nan)
        predicted_decrease = history.predicted_decrease
        held = max(history.row.loss, abs(history.reference_loss) / 10)
        if held > 0 and np.isfinite(predicted_decrease).any():
            if np.nansum(predicted_decrease) > self.limit * held:  # looked up only where the rule would fire
                predicted_decrease = predicted_decrease * _share_that_is_unusual(history)
            value[np.nanargmax(predicted_decrease)] = np.nansum(predicted_decrease) / held
        return value

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        loss, began = history.row.loss, history.reference_loss
        return {"loss": loss, "began": began, "against": max(loss, abs(began) / 10)}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss, against = alarm.numbers["loss"], alarm.numbers["against"]
        if not math.isfinite(alarm.value):
            return f"the update due at step {alarm.step} had no finite length, because of {alarm.layer}"
        times, limit = apart(alarm.value, alarm.limit)
        base = "the whole loss" if loss >= against else "a tenth of the loss at the beginning"
        lower = number(alarm.value * against)
        return (
            f"the update due at step {alarm.step} was so long that by its gradients it would lower the loss by {lower}, "
            f"{times} times {base} ({number(against)}; limit {limit}), most of it in {alarm.layer}"
        )


def _share_that_is_unusual(history: History) -> Floats:
    """Return by how much the square of each layer's typical norm lies below that of its usual one, shape (L,)."""
    share = np.square(history.usual_grad / usual_norms(history, range(len(history.layers))))
    return np.where(np.isfinite(share), share, 1.0)
