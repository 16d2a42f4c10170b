"""Clip by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import PerLayer, Step, UnreadStep
from gradwatch.device import Copies
from gradwatch.measure.norms import NormPlan, global_norm_of

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History


class ClipValue(PerLayer):
    """Limit every gradient element to ``[-max_value, max_value]``, as `torch.nn.utils.clip_grad_value_` does.

    ``layers`` sets other bounds for layers by name: ``ClipValue(5.0, layers={"lstm.*": 10.0, "head.*": 100.0})`` (Graves,
    "Generating sequences with recurrent neural networks" (2013), arXiv:1308.0850, limits the derivatives of LSTMs to 10
    and of outputs to 100). The real and imaginary parts of complex elements are limited separately. The direction of the
    gradient is not kept. Source: Mikolov, "Statistical language models based on neural networks" (2012).
    """

    looks_inside: ClassVar[bool] = True
    takes_threshold: ClassVar[bool] = True
    max_value: float = Field(default=0.5, gt=0)

    def __init__(self, max_value: float = 0.5, **settings: Any) -> None:
        super().__init__(max_value=max_value, **settings)

    def apply(self, step: Step) -> float:
        if not math.isfinite(step.global_norm):
            return 1.0
        bounds = self.bounds(self.max_value, step.layers, step.columns)
        for gradient, bound in zip(step.gradients, bounds.tolist(), strict=True):
            _limit(gradient, -bound * step.scale, bound * step.scale)
        after = norm_left(step)
        return min(1.0, after / step.global_norm) if step.global_norm > 0 else 1.0

    def apply_unread(self, step: UnreadStep) -> Tensor:
        acts = step.acts
        width = torch.where(acts, step.scale, math.inf)
        bounds = self.bounds(self.max_value, step.layers, step.columns).tolist()
        limits = {bound: (Copies(-bound * width), Copies(bound * width)) for bound in set(bounds)}
        for gradient, bound in zip(step.gradients, bounds, strict=True):
            low, high = limits[bound]
            _limit(gradient, low.on(gradient.device), high.on(gradient.device))
        return share_left(step, acts)

    def loosened(self, factor: float) -> ClipValue:
        return ClipValue(self.max_value * factor, layers=self.wider(factor))

    def at_norm(self, norm: float, history: History) -> ClipValue:
        """Return the same clip with the bound at which a gradient whose elements all equal the bound has this norm."""
        value = float(f"{norm / math.sqrt(history.sizes.sum()):.4g}")
        return ClipValue(value, layers=self.wider(value / self.max_value))


def norm_left(step: Step) -> float:
    """Measure and return the global norm of the gradients that this process holds, without the loss scale."""
    return global_norm_of(NormPlan(step.gradients).norms(step.gradients)) / step.scale


def share_left(step: UnreadStep, acts: Tensor) -> Tensor:
    """Measure the norm again on the device; return it over the norm before, at most 1, and 1 where the clip does not act."""
    home = step.global_norm.device
    after = NormPlan(step.gradients).norms_on(home, step.gradients) / step.scale
    left = torch.sqrt(torch.square(after).sum()) / step.global_norm  # same order as before: 1 if unchanged
    return torch.where(acts & (left < math.inf), left.clamp(max=1.0), 1.0)


def _limit(gradient: Tensor, low: Any, high: Any) -> None:
    """Limit each element to ``[low, high]`` in place; both are numbers or tensors of shape ()."""
    if gradient.layout is torch.strided:
        values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        values.clamp_(low, high)
    else:
        summed = gradient.coalesce()
        summed.values().clamp_(low, high)
        gradient.copy_(summed)
