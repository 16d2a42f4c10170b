"""Clip by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from gradwatch.clips.base import Clip
from gradwatch.measure import NormPlan, global_norm_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ClipValue(Clip):
    """Limit every gradient element to ``[-max_value, max_value]``, as `torch.nn.utils.clip_grad_value_`.

    Complex elements are limited in their real and imaginary parts. The direction is not kept. Source: Mikolov,
    "Statistical language models based on neural networks" (2012).
    """

    max_value: float = Field(default=0.5, gt=0)

    def __init__(self, max_value: float = 0.5, **settings: Any) -> None:
        super().__init__(max_value=max_value, **settings)

    def apply(self, gradients: Sequence[Tensor], global_norm: float) -> float:
        """See `Clip.apply`."""
        for gradient in gradients:
            _limit(gradient, self.max_value)
        after = global_norm_of(NormPlan(gradients).norms(list(gradients)))
        return min(1.0, after / global_norm) if global_norm > 0 and math.isfinite(global_norm) else 1.0

    def apply_unread(
        self, gradients: Sequence[Tensor], global_norm: Tensor, fires: Tensor | None, scale: Any
    ) -> Tensor:
        """See `Clip.apply_unread`."""
        bound = self.max_value * torch.as_tensor(scale)
        if fires is not None:
            bound = torch.where(fires, bound.to(fires.device, non_blocking=True), math.inf)
        for gradient in gradients:
            _limit(gradient, bound.to(gradient.device, non_blocking=True))
        after = NormPlan(gradients).norms_on(global_norm.device, list(gradients)) / scale
        left = torch.sqrt(torch.square(after).sum()) / global_norm  # summed as the norm before it was: equal is equal
        acted = torch.isfinite(left) if fires is None else torch.isfinite(left) & fires
        return torch.where(acted, left.clamp(max=1.0), 1.0)

    def loosened(self, factor: float) -> ClipValue:
        """See `Clip.loosened`."""
        return ClipValue(self.max_value * factor)


def _limit(gradient: Tensor, bound: Any) -> None:
    """Limit each element in place; ``bound`` is a number or a tensor without dimensions."""
    if gradient.layout is torch.strided:
        values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        values.clamp_(-bound, bound)
    else:
        summed = gradient.coalesce()
        summed.values().clamp_(-bound, bound)
        gradient.copy_(summed)
