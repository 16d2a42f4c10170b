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
            if gradient.layout is torch.strided:
                values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
                values.clamp_(-self.max_value, self.max_value)
            else:
                summed = gradient.coalesce()
                summed.values().clamp_(-self.max_value, self.max_value)
                gradient.copy_(summed)
        after = global_norm_of(NormPlan(gradients).norms(list(gradients)))
        return min(1.0, after / global_norm) if global_norm > 0 and math.isfinite(global_norm) else 1.0

    def loosened(self, factor: float) -> ClipValue:
        """See `Clip.loosened`."""
        return ClipValue(self.max_value * factor)
