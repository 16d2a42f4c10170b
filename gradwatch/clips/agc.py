"""Clip the gradient of each unit relative to the norm of its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from gradwatch import device
from gradwatch.clips.base import PerLayer, Step, UnreadStep
from gradwatch.clips.value import norm_left, share_left
from gradwatch.measure.norms import AT_ONCE, on_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    _Layer = tuple[Tensor, Tensor, float]  # gradient, weight, bound

_FEW_UNITS = 1 << 12  # that may always be taken together
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
        bounds = self.bounds(self.clipping, step.layers, step.columns).tolist()
        everywhere = device.Copies(step.acts)
        scale = device.Copies(step.scale) if isinstance(step.scale, torch.Tensor) else None
        together: dict[tuple[torch.device, torch.dtype], list[_Layer]] = {}
        for gradient, weight, bound in zip(step.gradients, step.parameters, bounds, strict=True):
            here, dtype = gradient.device, gradient.dtype
            if gradient.layout is torch.strided and not gradient.is_complex():
                together.setdefault((here, dtype), []).append((gradient, weight.detach(), bound))
            else:
                factor = _factor(gradient, weight, bound, step.scale if scale is None else scale.on(here))
                _multiply(gradient, torch.where(everywhere.on(here), factor, 1.0))
        for (here, _), layers in together.items():
            for batch in _batches(layers):
                _clip_together(batch, everywhere.on(here), step.scale if scale is None else scale.on(here))
        return share_left(step, step.acts)

    def loosened(self, factor: float) -> ClipAGC:
        return ClipAGC(self.clipping * factor, layers=self.wider(factor))


def _units(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() > 1 else 1


def _batches(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Split layers so that the numbers of a batch, 17 bytes for each unit, take little memory beside the gradients."""
    most = max(_FEW_UNITS, sum(gradient.nbytes for gradient, _, _ in layers) // 4096)
    batch: list[_Layer] = []
    taken = 0
    for layer in layers:
        if batch and taken + _units(layer[0]) > most:
            yield batch
            batch, taken = [], 0
        batch.append(layer)
        taken += _units(layer[0])
    yield batch


def _clip_together(layers: list[_Layer], acts: Tensor, scale: Any) -> None:
    """Clip the gradients of layers on one device, of one dtype, with the factors of all units computed together."""
    gradients, weights, bounds = zip(*layers, strict=True)
    units = list(map(_units, gradients))
    limit = _norms_together(weights, units).clamp_(min=_LEAST)
    if len(set(bounds)) == 1:
        limit.mul_(bounds[0])
    else:
        limit.mul_(on_device(np.repeat(bounds, units), limit.device))
    norm = _norms_together(gradients, units).div_(scale)
    beyond = (norm > limit).logical_and_(acts)
    factors = limit.div_(norm.clamp_(min=1e-6)).masked_fill_(beyond.logical_not_(), 1.0)
    parts = [
        part.view(-1, *(1,) * (gradient.dim() - 1)) if gradient.dim() > 1 else part.view(())
        for part, gradient in zip(factors.split(units), gradients, strict=True)
    ]
    torch._foreach_mul_(list(gradients), parts)


def _norms_together(tensors: Sequence[Tensor], units: Sequence[int]) -> Tensor:
    """Return the norms of all units of some tensors, shape (sum of ``units``,), with one kernel for each matrix.

    They are computed in the widest float, so squares do not overflow. Large matrices are measured in parts.
    """
    wide = device.widest_float(tensors[0].device)
    norms = torch.empty(sum(units), dtype=wide, device=tensors[0].device)
    places = norms.split(list(units))
    vectors = [index for index, tensor in enumerate(tensors) if tensor.dim() <= 1]
    for tensor, place in zip(tensors, places, strict=True):
        if tensor.dim() > 1:
            rows = _rows(tensor)
            for part, here in zip(tensor.split(rows), place.split(rows), strict=True):
                torch.linalg.vector_norm(part, dim=tuple(range(1, part.dim())), dtype=wide, out=here)
    if vectors:
        found = torch._foreach_norm([tensors[index] for index in vectors], 2, dtype=wide)
        torch._foreach_copy_([places[index].view(()) for index in vectors], list(found))
    return norms


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
        whole: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
        return whole
    dims = tuple(range(1, tensor.dim()))
    norms = [torch.linalg.vector_norm(part, dim=dims, keepdim=True, dtype=wide) for part in tensor.split(_rows(tensor))]
    return torch.cat(norms) if len(norms) > 1 else norms[0]


def _rows(tensor: Tensor) -> int:
    """Return how many rows of a tensor are measured at once, because torch copies them into the wider dtype."""
    return max(1, AT_ONCE * tensor.shape[0] // max(1, tensor.numel()))


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
