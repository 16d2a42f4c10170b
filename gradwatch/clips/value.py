"""Clip by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import PerLayer, Step, UnreadStep
from gradwatch.measure.norms import NormPlan, global_norm_of

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History


class ClipValue(PerLayer):
    """Limit every gradient element to ``[-max_value, max_value]``, as `torch.nn.utils.clip_grad_value_`.

    ``layers`` gives other bounds to layers by name: ``ClipValue(5.0, layers={"lstm.*": 10.0, "head.*": 100.0})`` (Graves,
    "Generating sequences with recurrent neural networks" (2013), arXiv:1308.0850, limits the derivatives of LSTMs to 10
    and of outputs to 100). Complex elements are limited in their real and imaginary parts. The direction is not kept.
    Source: Mikolov, "Statistical language models based on neural networks" (2012).
    """

    looks_inside: ClassVar[bool] = True
    takes_threshold: ClassVar[bool] = True
    max_value: float = Field(default=0.5, gt=0)

    def __init__(self, max_value: float = 0.5, **settings: Any) -> None:
        super().__init__(max_value=max_value, **settings)

    def apply(self, step: Step) -> float:
        """See `Clip.apply`."""
        if not math.isfinite(step.global_norm):
            return 1.0
        bounds = self.bounds(self.max_value, step.layers, step.columns)
        for gradient, bound in zip(step.gradients, bounds.tolist(), strict=True):
            _limit(gradient, bound * step.scale)
        after = norm_left(step)
        return min(1.0, after / step.global_norm) if step.global_norm > 0 else 1.0

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """See `Clip.apply_unread`."""
        acts = torch.isfinite(step.global_norm)
        acts = acts if step.fires is None else acts & step.fires
        scale = step.scale
        if isinstance(scale, torch.Tensor):
            scale = scale.to(acts.device, non_blocking=True)
        width = torch.where(acts, scale, math.inf)
        bounds = self.bounds(self.max_value, step.layers, step.columns)
        for gradient, bound in zip(step.gradients, bounds.tolist(), strict=True):
            _limit(gradient, (bound * width).to(gradient.device, non_blocking=True))
        return share_left(step, acts)

    def loosened(self, factor: float) -> ClipValue:
        """See `Clip.loosened`."""
        return ClipValue(self.max_value * factor, layers=self.wider(factor))

    def at_norm(self, norm: float, history: History) -> ClipValue:
        """See `Clip.at_norm`: a gradient whose elements all stand at the bound has this norm."""
        value = float(f"{norm / math.sqrt(history.sizes.sum()):.4g}")
        return ClipValue(value, layers=self.wider(value / self.max_value))


def norm_left(step: Step) -> float:
    """Measure again: return the global norm of what this process holds, without the loss scale."""
    return global_norm_of(NormPlan(step.gradients).norms(step.gradients)) / step.scale


def share_left(step: UnreadStep, acts: Tensor) -> Tensor:
    """Measure again on the device: return the norm over what it was, at most 1, where the clip acts."""
    home = step.global_norm.device
    after = NormPlan(step.gradients).norms_on(home, step.gradients) / step.scale
    left = torch.sqrt(torch.square(after).sum()) / step.global_norm  # summed as the norm before it was: equal is equal
    return torch.where(acts & torch.isfinite(left), left.clamp(max=1.0), 1.0)


def _limit(gradient: Tensor, bound: Any) -> None:
    """Limit each element in place; ``bound`` is a number or a tensor without dimensions."""
    if gradient.layout is torch.strided:
        values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        values.clamp_(-bound, bound)
    else:
        summed = gradient.coalesce()
        summed.values().clamp_(-bound, bound)
        gradient.copy_(summed)
