"""Scale gradients to a fixed norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import OneFactor

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History

_MOST = 1e30  # largest factor; float32 would overflow soon beyond it


class ScaleToNorm(OneFactor):
    """Scale all gradients by one factor so that their global norm equals ``norm``, whether it was larger or smaller.

    ``g <- g * norm / ||g||``. The gradient determines only the direction of the step, the learning rate its length. A
    gradient of zero stays zero. Source: "gradient scaling" in tutorials such as Brownlee, "How to avoid exploding gradients
    with gradient clipping" (2019); normalised gradient descent, Nesterov (1984).
    """

    takes_threshold: ClassVar[bool] = True
    norm: float = Field(default=10.0, gt=0)

    def __init__(self, norm: float = 10.0, **settings: Any) -> None:
        super().__init__(norm=norm, **settings)

    def factor(self, global_norm: float) -> float:
        return min(self.norm / global_norm, _MOST) if global_norm > 0 else 1.0

    def factor_of(self, global_norm: Tensor) -> Tensor:
        return torch.where(global_norm > 0, torch.clamp(self.norm / global_norm, max=_MOST), 1.0)

    def loosened(self, factor: float) -> ScaleToNorm:
        return ScaleToNorm(self.norm * factor)

    def at_norm(self, norm: float, history: History) -> ScaleToNorm:  # noqa: ARG002
        return ScaleToNorm(float(f"{norm:.4g}"))
