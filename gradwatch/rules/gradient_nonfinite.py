"""GW302: gradients are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class GradientNonFinite(Rule):
    """Gradients hold NaN or infinite values.

    ## What it means
    At least one gradient element of the layer is NaN or infinite. Finite gradients whose norm overflows do not count:
    gradwatch measures their norm again in float64.

    ## Formula
    `value = 1` where the layer's gradient holds NaN, `2` where it holds infinite values, `3` for both, else `0`. It fires
    where `value > limit` (0).

    ## Why it is bad
    An optimizer step with such a gradient writes NaN into the weights and into the optimizer's moments.

    ## What to do
    The incident names the first layer in backward order and counts the elements. Do not apply the step: `clip="norm"`
    skips it. Then look for the operation that produced the value: log, sqrt, division, exp, the norm of a zero vector, an
    attention row masked entirely with -inf.

    ## When it is harmless
    Occasionally under float16 with a GradScaler, which finds its scale by overflowing and skips such steps itself.

    ## Source
    IEEE 754 arithmetic; `torch.amp.GradScaler`.
    """

    code: ClassVar[str] = "GW302"
    name: ClassVar[str] = "gradients not finite"
    sign: ClassVar[Sign] = "numeric"
    kind: ClassVar[Kind] = "nonfinite"
    cases: ClassVar[tuple[Case, ...]] = (
        Case("one layer goes NaN", fires=3, grad={"a": "1x6", "b": "1x3 nan"}),
        Case("infinite", fires=1, grad="1 inf"),
        Case("huge but finite", fires=None, grad="1e38x4"),
    )

    def measure(self, history: History) -> Floats:
        """Return the non-finite code of each layer's gradient, shape (L,)."""
        return history.nonfinite.astype(float)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        what = {1: "NaN", 2: "infinite values"}.get(int(alarm.value), "NaN and infinite values")
        return f"the gradient of {alarm.layer} held {what} at step {alarm.step}"
