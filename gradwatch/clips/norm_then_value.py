"""Clip by global norm, then by value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch.clips.base import Clip, Step, UnreadStep
from gradwatch.clips.norm import ClipNorm
from gradwatch.clips.value import ClipValue

if TYPE_CHECKING:
    from torch import Tensor


class ClipNormThenValue(Clip):
    """Scale the gradients to a global norm of at most ``max_norm``, then limit each element to ``[-max_value, max_value]``.

    Equivalent to `torch.nn.utils.clip_grad_norm_` followed by `torch.nn.utils.clip_grad_value_`. Source: Brownlee, "How to
    avoid exploding gradients with gradient clipping" (2019), suggests trying both together.
    """

    looks_inside: ClassVar[bool] = True
    max_norm: float = Field(default=1.0, gt=0)
    max_value: float = Field(default=0.5, gt=0)

    def __init__(self, max_norm: float = 1.0, max_value: float = 0.5, **settings: Any) -> None:
        super().__init__(max_norm=max_norm, max_value=max_value, **settings)

    def apply(self, step: Step) -> float:
        if not math.isfinite(step.global_norm):
            return 1.0
        first = ClipNorm(self.max_norm).apply(step)
        left = replace(step, norms=step.norms * first, global_norm=step.global_norm * first)
        return first * ClipValue(self.max_value).apply(left)

    def apply_unread(self, step: UnreadStep) -> Tensor:
        first = ClipNorm(self.max_norm).apply_unread(step)
        left = replace(step, norms=step.norms * first, global_norm=step.global_norm * first)
        return torch.where(torch.isfinite(first), first, 1.0) * ClipValue(self.max_value).apply_unread(left)

    def loosened(self, factor: float) -> ClipNormThenValue:
        return ClipNormThenValue(self.max_norm * factor, self.max_value * factor)
