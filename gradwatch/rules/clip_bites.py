"""GW501: the clip bites on most steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign

_LAST = 100


class ClipBites(Rule):
    """The clip bites on most steps: it acts as a learning rate.

    ## What it means
    A clip, your own or auto-clip's, made the gradients smaller on more than four in five of the last 100 steps.

    ## Formula
    `value = (number of steps with a clip coefficient below 1) / 100`, over the last 100 rows. It fires where
    `value > limit` (0.8), in row 100 at the earliest. It opens no incident; it is reported as a note.

    ## Why it is bad
    A clip is meant for rare steps. A clip that always bites gives every update the same length, so the learning rate no
    longer has its usual meaning. It can also hide a fault, because norms that keep growing do not show in the loss.

    ## What to do
    Look at the norms before the clip (`monitor.history.global_norm()`) and raise the threshold until it catches only
    outliers; `monitor.suggest_clip()` counts the steps that each choice would have clipped. If the norms themselves keep
    growing, look for the cause: the learning rate, the scale of the targets, the initialisation.

    ## When it is harmless
    Where gradients are scaled to a fixed norm on purpose, and in the first phase of recipes that clip hard by design.

    ## Source
    Pascanu et al. (2013), arXiv:1211.5063: thresholds of half to ten times the average norm converge alike.
    """

    code: ClassVar[str] = "GW501"
    name: ClassVar[str] = "clip bites on most steps"
    sign: ClassVar[Sign] = "clip"
    kind: ClassVar[Kind] = "clipping"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a threshold far too low", fires=99, clip="0.1x120"),
        Case("from step 60 on", fires=140, clip="1x60 0.5x100"),
        Case("every other step", fires=None, clip="1 0.5 1 0.5 1 0.5 1 0.5 1x150"),
        Case("no clip", fires=None, grad="1x150"),
    )

    limit: float = Field(default=0.8, gt=0, lt=1)

    def measure(self, history: History) -> Floats:
        """Return the share of the last 100 steps that were clipped, shape (1,); 0 before row 100."""
        if history.rows < _LAST:
            return np.zeros(1)
        return np.array([np.count_nonzero(history.clip_coefficient(last=_LAST) < 1) / _LAST])
