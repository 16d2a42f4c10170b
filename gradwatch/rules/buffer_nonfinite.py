"""GW307: buffers are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class BufferNonFinite(Rule):
    """Buffers hold NaN or infinite values, such as the running statistics of a normalisation.

    ## What it means
    A tensor that the model keeps beside its parameters has become NaN or infinite. Losses and gradients may all be finite.

    ## Formula
    `value = 1` in the row in which a buffer of floating point is first found not to be finite, else `0`. It fires where
    `value > limit` (0). Buffers are looked at with each sample of the weights: in the first 32 rows, at least with every 32nd
    row later, and in each while an explosion is open. Those that held infinity when the model was attached or when they
    came, such as a causal mask of minus infinity, do not count while they hold no NaN.

    ## Why it is bad
    Batch normalisation takes each batch into its running statistics in the forward pass, also one that is left out afterwards
    because its loss is NaN. In training mode they are not used; in evaluation, all outputs are NaN.

    ## What to do
    Leave such batches out before the forward pass. `module.reset_running_stats()` and some training steps repair them, and so
    does a checkpoint from before. Where auto-clip leaves out a step, it restores the buffers too.

    ## When it is harmless
    A buffer that stands for infinity on purpose, such as a best loss so far.

    ## Source
    `torch.nn.BatchNorm2d`: running estimates are updated in each forward pass in training mode.
    """

    code: ClassVar[str] = "GW307"
    name: ClassVar[str] = "buffers not finite"
    sign: ClassVar[Sign] = "numeric"
    kind: ClassVar[Kind] = "nonfinite"
    role: ClassVar[Role] = "buffer"
    per_layer: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("running statistics become NaN", fires=40, buffers="1x40 0x20"),
        Case("all are finite", fires=None, buffers="1x60"),
    )

    def measure(self, history: History) -> Floats:
        """Return 1 in the row in which buffers are first found not to be finite, else 0; shape (1,)."""
        return np.array([float(history.buffers_bad_since == history.row.step)])

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        return f"a buffer of the model held NaN or infinity by step {alarm.step}"
