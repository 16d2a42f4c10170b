"""Whether a step on a device surges or overshoots, before any rule has seen it, by the limits of the rules and the run so far.

Each line is a kernel or two on a quiet step of an armed run, so limits are squared and laid out once for each plan's norms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch.measure.norms import on_device

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.autoclip.decision import DevicePlan
    from gradwatch.records import Floats


def squared_limits(usual: Floats, plan: DevicePlan, home: torch.device) -> Tensor:
    """Return the squared norms above which layers are far beyond the limit, and surge, on the device, shape (2, L).

    Args:
        usual: usual norms, shape (L,); NaN where they are unknown: such layers never surge.
        plan: the limits.
        home: the device.
    """
    with np.errstate(over="ignore"):
        return on_device(np.nan_to_num(np.array([[plan.far], [plan.surge]]) * usual, nan=np.inf) ** 2, home)


def surges(squares: Tensor, limits: Tensor, loss: Tensor, plan: DevicePlan) -> Tensor:
    """Return whether a step surges, as a bool tensor without dimensions; nothing is read on the host.

    It does if a layer is above the limit and the loss above its ceiling, or if a layer is far above the limit and either most
    layers are not or the loss is above its level: as for an incident of the same step on the CPU.

    Args:
        squares: squared gradient norms of all layers before any clip, shape (L,); 0 where there is none.
        limits: the result of `squared_limits`.
        loss: loss of the step, shape (); NaN if none was seen, which counts as above.
        plan: the limits of the loss.
    """
    beyond = (squares > limits).sum(1)
    far, surging = (beyond > 0).unbind()
    level = loss <= plan.loss_level
    # of two truth values, "greater" is one kernel for "and not"
    alone = far > ((beyond[0] > len(squares) // 2) & level)
    return alone | (surging > (loss <= plan.loss_ceiling))


def overshoots(squares: Tensor, rates: Tensor, loss: Tensor, plan: DevicePlan) -> Tensor:
    """Return whether a step of SGD is predicted to take far more from the loss than it holds, as a bool tensor of shape ().

    Args:
        squares: squared gradient norms of all layers as the optimizer sees them, shape (L,).
        rates: learning rates of the layers, shape (L,); 0 where nothing is predicted.
        loss: loss of the step, shape (); NaN if none was seen, which nothing exceeds.
        plan: the limits.
    """
    held = loss if math.isnan(plan.reference) else torch.clamp(loss, min=abs(plan.reference) / 10)
    return ((squares * rates).sum() > plan.overshoot * held) & (held > 0)
