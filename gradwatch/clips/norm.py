"""Clip by global norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import Clip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class ClipNorm(Clip):
    """Scale all gradients by one factor so that their global norm is at most ``max_norm``: the direction is kept.

    ``g <- g * min(1, max_norm / (||g|| + 1e-6))``, as `torch.nn.utils.clip_grad_norm_`, with the norm that was measured
    anyway. Source: Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), arXiv:1211.5063.
    """

    keeps_direction: ClassVar[bool] = True
    max_norm: float = Field(default=1.0, gt=0)

    def __init__(self, max_norm: float = 1.0, **settings: Any) -> None:
        super().__init__(max_norm=max_norm, **settings)

    def apply(self, gradients: Sequence[Tensor], global_norm: float) -> float:
        """See `Clip.apply`."""
        coefficient = self.max_norm / (global_norm + 1e-6)
        if coefficient >= 1.0:
            return 1.0
        scale(gradients, coefficient)
        return coefficient

    def loosened(self, factor: float) -> ClipNorm:
        """See `Clip.loosened`."""
        return ClipNorm(self.max_norm * factor)


def scale(gradients: Sequence[Tensor], coefficient: float) -> None:
    """Multiply every gradient by ``coefficient``, in place; sparse ones too."""
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(coefficient)
    if dense:
        torch._foreach_mul_(dense, coefficient)
