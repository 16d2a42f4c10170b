"""The decisions of auto-clip: for a step that was judged, and in advance for a step that is not known yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.autoclip.guard import Guard
    from gradwatch.clips import Clip
    from gradwatch.records import Floats


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a step before the optimizer makes it.

    Args:
        clip: clip to apply; None: no clip.
        skip: True to leave out the step.
        rate: factor on the learning rates of the step.
        guard: corrections beyond the clip; None: no corrections.
    """

    clip: Clip | None = None
    skip: bool = False
    rate: float = 1.0
    guard: Guard | None = None


NOTHING = Decision()


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What to do with a step that no rule has judged yet. Used for gradients on a device, whose rows arrive steps later.

    Args:
        clip: clip to apply to each step while auto-clip is on; None: auto-clip is off.
        guard: corrections beyond the clip while auto-clip is on; None: no corrections.
        reserve: clip to apply to a step that surges or overshoots (see `gradwatch.probe.surge`).
        usual: norms that a surge of one step is measured by, shape (L,) (see `gradwatch.history.recurrence.one_step_norms`).
        judged: number of layers with such a norm.
        least_weight: norms below which weights count as that large, as in GW303, shape (L,); infinite where no update is too
            large for the weights.
        skip: True to leave out a step whose gradients are not finite.
        surge: multiple of its usual norm above which a layer surges if the loss is above ``loss_ceiling``.
        far: multiple above which it surges if few layers do so, or if the loss is above ``loss_level``.
        update: multiple of the norm of the weights by which a step of SGD may move them if the loss is above ``loss_jump``, as
            in GW303.
        early: whether the coming step is one of the first, in which a step that moves weights too far or overshoots is an
            incident by itself.
        overshoot: multiple of the loss that a step of SGD may be predicted to take in the first steps of a run, as in GW305;
            infinite after them.
        reference: reference loss of the run, a tenth of which bounds the loss in that comparison; NaN if it is not known yet.
        loss_ceiling, loss_level: usual upper bound of the loss, and its level with its scatter.
        loss_jump: loss above which it jumps, as in GW102.
        skip_above: global norm above which a step is left out.
        rate: factor on the learning rates of the step.
        outliers_alone: whether a step that surges is clipped only if its loss is not above its ceiling, as under Adam in a run
            that has not learned yet.
    """

    clip: Clip | None = None
    guard: Guard | None = None
    reserve: Clip | None = None
    usual: Floats | None = None
    judged: int = 0
    least_weight: Floats | None = None
    skip: bool = False
    surge: float = math.inf
    far: float = math.inf
    update: float = math.inf
    early: bool = False
    overshoot: float = math.inf
    reference: float = math.nan
    loss_ceiling: float = math.inf
    loss_level: float = math.inf
    loss_jump: float = math.inf
    skip_above: float = math.inf
    rate: float = 1.0
    outliers_alone: bool = False
