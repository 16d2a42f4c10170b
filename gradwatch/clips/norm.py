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
        scale_by(gradients, coefficient)
        return coefficient

    def factor(self, global_norm: Tensor, fires: Tensor | None) -> Tensor:
        """See `Clip.factor`; 1 where the norm is not finite."""
        factor = torch.clamp(self.max_norm / (global_norm + 1e-6), max=1.0)
        clips = torch.isfinite(global_norm)
        return torch.where(clips if fires is None else clips & fires, factor, 1.0)

    def apply_unread(
        self,
        gradients: Sequence[Tensor],
        global_norm: Tensor,
        fires: Tensor | None,
        scale: Any,  # noqa: ARG002  a factor knows no scale
    ) -> Tensor:
        """See `Clip.apply_unread`."""
        factor = self.factor(global_norm, fires)
        scale_by(gradients, factor)
        return factor

    def loosened(self, factor: float) -> ClipNorm:
        """See `Clip.loosened`."""
        return ClipNorm(self.max_norm * factor)


def scale_by(gradients: Sequence[Tensor], coefficient: float | Tensor) -> None:
    """Multiply every gradient by ``coefficient``, in place; sparse ones too, on whatever devices they are."""
    dense: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.layout is torch.strided:
            dense.setdefault(gradient.device, []).append(gradient)
        else:
            gradient.mul_(coefficient)
    for device, together in dense.items():
        # a 0-dim tensor of float32 leaves the gradients' own dtype as it is
        there = (
            coefficient.to(device, torch.float32, non_blocking=True)
            if isinstance(coefficient, torch.Tensor)
            else coefficient
        )
        torch._foreach_mul_(together, there)
