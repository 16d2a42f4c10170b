"""Clip the gradient of each unit relative to the norm of its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from gradwatch import device
from gradwatch.clips.base import PerLayer, Step, UnreadStep
from gradwatch.clips.value import norm_left, share_left
from gradwatch.measure.norms import AT_ONCE

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-3  # lower bound of the norm of a unit's weights, so that units that start at zero can learn


class ClipAGC(PerLayer):
    """Adaptive gradient clipping: limit the gradient norm of each unit to ``clipping`` times the norm of its weights.

    ``g_i <- g_i * min(1, clipping * max(||w_i||, 1e-3) / ||g_i||)`` for each unit i, which is a row along the first dimension
    of a weight, or a whole bias. ``layers`` sets other bounds for layers by name; the paper does not clip the last linear
    layer. It needs whole layers, so it is refused in sharded training. Source: Brock et al., "High-performance large-scale
    image recognition without normalization" (2021), arXiv:2102.06171.
    """

    looks_inside: ClassVar[bool] = True
    needs_whole_layers: ClassVar[bool] = True
    clipping: float = Field(default=0.01, gt=0)

    def __init__(self, clipping: float = 0.01, **settings: Any) -> None:
        super().__init__(clipping=clipping, **settings)

    def apply(self, step: Step) -> float:
        if not math.isfinite(step.global_norm):
            return 1.0
        bounds = self.bounds(self.clipping, step.layers, step.columns).tolist()
        bit = False
        for gradient, weight, bound in zip(step.gradients, step.parameters, bounds, strict=True):
            factor = _factor(gradient, weight, bound, step.scale)
            if (factor < 1).any():  # a host read, free on the CPU
                _multiply(gradient, factor)
                bit = True
        return min(1.0, norm_left(step) / step.global_norm) if bit and step.global_norm > 0 else 1.0

    def apply_unread(self, step: UnreadStep) -> Tensor:
        acts = torch.isfinite(step.global_norm)
        acts = acts if step.fires is None else acts & step.fires
        bounds = self.bounds(self.clipping, step.layers, step.columns).tolist()
        everywhere = device.Copies(acts)
        scale = device.Copies(step.scale) if isinstance(step.scale, torch.Tensor) else None
        for gradient, weight, bound in zip(step.gradients, step.parameters, bounds, strict=True):
            here = gradient.device
            factor = _factor(gradient, weight, bound, step.scale if scale is None else scale.on(here))
            _multiply(gradient, torch.where(everywhere.on(here), factor, 1.0))
        return share_left(step, acts)

    def loosened(self, factor: float) -> ClipAGC:
        return ClipAGC(self.clipping * factor, layers=self.wider(factor))


def _factor(gradient: Tensor, weight: Tensor, bound: float, scale: Any) -> Tensor:
    """Return the factor of each unit, in a shape that broadcasts with the gradient or, if sparse, with its values."""
    weight = weight.detach()
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce()
        if gradient.sparse_dim() == 1:
            weight = weight[gradient.indices()[0]]
        gradient = gradient.values()
    limit = bound * _unit_norms(weight).clamp(min=_LEAST)
    norm = _unit_norms(gradient) / scale
    return torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0)


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each unit, or one norm for a vector; computed in the widest float, so squares do not overflow."""
    wide = _wide(tensor)
    if tensor.dim() <= 1:
        norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
        return norm
    dims = tuple(range(1, tensor.dim()))
    rows = max(1, AT_ONCE * tensor.shape[0] // max(1, tensor.numel()))  # torch copies them into the wider dtype
    norms = [torch.linalg.vector_norm(part, dim=dims, keepdim=True, dtype=wide) for part in tensor.split(rows)]
    return torch.cat(norms) if len(norms) > 1 else norms[0]


def _wide(tensor: Tensor) -> torch.dtype:
    wide = device.widest_float(tensor.device)
    if tensor.is_complex():
        return torch.complex128 if wide is torch.float64 else torch.complex64
    return wide


def _multiply(gradient: Tensor, factor: Tensor) -> None:
    if gradient.layout is torch.strided:
        gradient.mul_(factor)
    else:
        summed = gradient.coalesce()
        summed.values().mul_(factor)
        gradient.copy_(summed)
