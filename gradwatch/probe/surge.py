"""Whether a step on a device surges, decided before any rule has seen it, by the limits of the rules and the run so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.autoclip.decision import DevicePlan


def surges(norms: Tensor, usual: Tensor, loss: Tensor, plan: DevicePlan) -> Tensor:
    """Return whether a step surges, as a bool tensor without dimensions; nothing is read on the host.

    It does if a layer is above the limit and the loss above its ceiling, or if a layer is far above the limit and either most
    layers are not or the loss is above its level: as for an incident of the same step on the CPU.

    Args:
        norms: gradient norms of all layers before any clip, shape (L,); 0 where there is none.
        usual: usual norms, shape (L,); NaN where they are unknown.
        loss: loss of the step, shape (); NaN if none was seen, which counts as above.
        plan: the limits.
    """
    surge = torch.where(torch.isfinite(norms), norms / usual, math.nan)
    far = torch.count_nonzero(surge > plan.far)
    alone = (far > 0) & ((2 * far <= len(norms)) | ~(loss <= plan.loss_level))
    return alone | ((surge > plan.surge).any() & ~(loss <= plan.loss_ceiling))
