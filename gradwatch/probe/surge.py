"""Whether a step on a device surges or overshoots, before any rule has seen it, by the limits of the rules and the run so far.

Each line is a kernel or two on a quiet step of an armed run, so limits are squared, and laid out anew only where they change.
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


class SquaredLimits:
    """The squared norms above which layers are far beyond the limit, surge, or move by more than their weights, on a device.

    Args:
        home: the device.
    """

    def __init__(self, home: torch.device) -> None:
        self._home = home
        self._limits: Tensor | None = None
        self._known: tuple[Floats | None, Floats | None, Floats | None] = None, None, None
        self._least: Tensor | None = None
        self._sampled: Tensor | None = None
        self._weights: Tensor | None = None  # squares of the weights, or of their least norms where these are larger

    def take_weights(self, squares: Tensor) -> None:
        """Take the squared norms of the weights that were sampled with a row, shape (L,)."""
        self._sampled = squares

    def of(self, plan: DevicePlan, rates: Floats | None) -> Tensor | None:
        """Return the limits of a step, shape (3, L); infinite where one is not known, None if none is.

        Args:
            plan: the limits, the usual norms, and the weights' least norms.
            rates: learning rates of the layers in a step of SGD, shape (L,); None: another optimizer, or not known.
        """
        usual, least = plan.usual, plan.least_weight
        if usual is None or least is None:
            return None
        if self._least is None or self._known[1] is not least:
            self._least, self._weights = on_device(least**2, self._home), None
        anew = any(one is not other for one, other in zip(self._known, (usual, least, rates), strict=True))
        if self._sampled is not None and len(self._sampled) == len(least):
            self._weights, self._sampled, anew = torch.maximum(self._sampled, self._least), None, True
        if anew:
            self._known = usual, least, rates
            updates = np.full(len(usual), np.inf)
            if rates is not None and self._weights is not None:
                np.divide(plan.update, rates, out=updates, where=rates > 0)
            with np.errstate(over="ignore"):
                limits = np.stack((plan.far * usual, plan.surge * usual, updates)) ** 2
            self._limits = on_device(np.nan_to_num(limits, nan=np.inf, posinf=np.inf), self._home)
            if self._weights is not None:
                self._limits[2].mul_(self._weights)
        return self._limits if self._weights is not None or np.isfinite(usual).any() else None


def surges(squares: Tensor, limits: Tensor, loss: Tensor, plan: DevicePlan, *, early: bool = False) -> Tensor:
    """Return whether a step surges, as a bool tensor without dimensions; nothing is read on the host.

    It does if a layer is above the limit and the loss above its ceiling; if a layer is far above the limit and either most
    layers are not or the loss is above its level; or if a layer is to move by more than its weights and the loss jumps: as for
    an incident of the same step on the CPU. It does not where only outliers are clipped and the loss is above its ceiling, unless
    a square is infinite, which an optimizer that divides by it would keep.

    Args:
        squares: squared gradient norms of all layers, shape (L,), or for each of the limits, shape (3, L): before any clip, and
            for the last one as the optimizer sees them; 0 where there is none.
        limits: the result of `SquaredLimits.of`, or its first two rows, if it is not known how far the step moves weights.
        loss: loss of the step, shape (); NaN if none was seen, which counts as above.
        plan: the limits of the loss.
        early: whether an update larger than the weights is an incident whatever the loss.
    """
    beyond = (squares > limits).sum(1)
    far, surging, *long = (beyond > 0).unbind()
    level = loss <= plan.loss_level
    # of two truth values, "greater" is one kernel for "and not"
    alone = far > ((beyond[0] > plan.judged // 2) & level)
    fires = alone | (surging > (loss <= plan.loss_ceiling))
    if long:
        fires = fires | (long[0] if early else long[0] > (loss <= plan.loss_jump))
    return fires > ((loss > plan.loss_ceiling) & (squares.sum() < math.inf)) if plan.outliers_alone else fires


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
