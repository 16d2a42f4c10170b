"""Clip by global norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import OneFactor

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History


class ClipNorm(OneFactor):
    """Scale all gradients by one factor so that their global norm is at most ``max_norm``; this keeps their direction.

    ``g <- g * min(1, max_norm / (||g|| + 1e-6))``, as in `torch.nn.utils.clip_grad_norm_`, with the norm that gradwatch has
    measured already. Source: Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), arXiv:1211.5063.
    """

    takes_threshold: ClassVar[bool] = True
    max_norm: float = Field(default=1.0, gt=0)

    def __init__(self, max_norm: float = 1.0, **settings: Any) -> None:
        super().__init__(max_norm=max_norm, **settings)

    def factor(self, global_norm: float) -> float:
        return min(1.0, self.max_norm / (global_norm + 1e-6))

    def factor_of(self, global_norm: Tensor) -> Tensor:
        return torch.clamp(self.max_norm / (global_norm + 1e-6), max=1.0)

    def loosened(self, factor: float) -> ClipNorm:
        return ClipNorm(self.max_norm * factor)

    def at_norm(self, norm: float, history: History) -> ClipNorm:  # noqa: ARG002
        return ClipNorm(float(f"{norm:.4g}"))  # four digits, as reports show it
