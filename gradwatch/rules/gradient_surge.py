"""GW301: the gradient norm surges relative to the run's own history."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.recurrence import ONE_STEP, spread_of, usual_norms
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class GradientSurge(Rule):
    """The gradient norm surges relative to the run's own history.

    ## What it means
    A layer's gradient norm is many times its usual value in this run, for two steps in a row or by a very large factor once.

    ## Formula
    `value = max(min(q_t, q_{t-1}), q_t / 10) / max(1, exp(4 s) / 10) / max(1, p / 2t)`, with `q = ||g|| / t`, `t` the
    layer's typical gradient norm (an exponential average of log norms, half-life 64 steps, finite values only, winsorised), at
    least a hundredth of that of all layers of the step together, `s` the usual distance of a log norm from it, and `p` the
    third-highest peak of the excursions above `2t` that came back, those of destructive explosions left out. What is next to
    nothing beside the others may grow a thousandfold while a run learns, as in a branch that begins at a scale of 1e-6.
    It fires where `value > limit` (10): two steps above 10 times the typical norm, or one above 100 times. Larger factors are
    needed in runs whose norms vary widely from step to step, such as those with a batch size of one, and in runs whose large
    norms recur, such as those with a rare class. It is silent during a layer's first 8 steps, and for a bias or gain whose own
    weight has had a gradient in the last 49 rows: that of a bias is a sum, which may cancel (before a normalisation it is
    rounding noise), and that of its weight shows how large the addends are.

    ## Why it is bad
    Gradients are best compared with the run's own history: explosions show as growth long before they show as NaN.

    ## What to do
    Clip by norm. Lower the learning rate. For recurrent models, shorten the sequences or use gated units.

    ## When it is harmless
    At the end of a plateau, when learning starts; after a change of the task or of the loss. While the loss keeps falling,
    a surge by itself opens no incident unless it is far beyond the limit. Gradient descent on a full batch settles at the edge of
    stability, and is thrown to flatter places where the curvature goes past it: norms and loss swing up and come back. As long as
    `lr ||g||^2 <= 8 L` with loss `L`, which proves no curvature from which they do not (GW305), a surge of several steps opens
    none, unless the learning rate reached its highest value within the last 50 rows.

    ## Source
    In a pilot study, which is not part of the repository, growth relative to the run's own median was a better criterion
    than absolute limits and z-scores: two steps above 10 times detected 24 of 25 explosions and fired in 2 of 70 healthy runs.
    The edge: Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability". Past it:
    Lewkowycz et al. 2020, "The large learning rate phase of deep learning: the catapult mechanism", arXiv:2003.02218.
    """

    code: ClassVar[str] = "GW301"
    name: ClassVar[str] = "gradient norm surges"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    role: ClassVar[Role] = "surge"
    cases: ClassVar[tuple[Case, ...]] = (
        Case("two steps at 20 times", fires=21, grad="0.1x20 2 2 2"),
        Case("one step at 500 times", fires=20, grad="0.1x20 50 0.1x10"),
        Case("one step at 20 times", fires=None, grad="0.1x20 2 0.1x10"),
        Case("large but stable", fires=None, grad="1e6x100"),
        Case("a NaN does not spoil the baseline", fires=33, grad="0.1x20 nan 0.1x11 2 2"),
        Case("fades away", fires=None, grad="1*0.9x200"),
    )

    limit: float = Field(default=10.0, gt=1)

    def measure(self, history: History) -> Floats:
        """Return the surge of each layer, shape (L,); NaN during a layer's first eight steps."""
        now, usual = history.surge(), history.usual_grad
        if history.task_rows < 2:
            return now
        before = history.grad_norm(last=2)[0] / usual
        value: Floats = np.fmax(np.minimum(now, before), now / ONE_STEP) / spread_of(history)
        high = np.flatnonzero(value > self.limit)
        if high.size:  # the lookup is expensive, so only where the rule would fire
            value[high] *= usual[high] / usual_norms(history, high.tolist())
        return value

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        two = history.task_rows >= 2
        return {
            "norm": history.row.grad_norm[column],
            "before": history.grad_norm(last=2)[0, column] if two else math.nan,
            "step before": history.steps(last=2)[0],
            "usual": usual_norms(history, [column])[0],
            "least": history.usual_grad[column] > history.typical_grad.value[column],
            "spread": max(1.0, math.exp(4 * history.typical_grad.scatter[column]) / 10),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        norm, before, usual = (alarm.numbers[name] for name in ("norm", "before", "usual"))
        begin, limit = f"the gradient norm of {alarm.layer} was {number(norm)} at step {alarm.step}", alarm.limit
        limit *= alarm.numbers["spread"]
        base = f"its usual {number(usual)}"
        if alarm.numbers.get("least"):
            base = f"{number(usual)}, a hundredth of what all layers usually have together"
        if before >= norm / 10:  # not where there was no gradient in the step before
            times, most = apart(min(norm, before) / usual, limit)
            return (
                f"{begin} and {number(before)} at step {alarm.numbers['step before']:.0f}, at least {times} times "
                f"{base} (limit {most} for two steps)"
            )
        times, most = apart(norm / usual, 10 * limit)
        return f"{begin}, {times} times {base} (limit {most} for a single step)"
