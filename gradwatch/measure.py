"""Per-layer L2 norms in one batched call, and a closer look at what is not finite.

L2 accumulates in float32 (float64 for double): a float16 norm of a healthy tensor overflows. On CPU, float32 sums over
many elements lose digits (1.7e-6 at 262 thousand normal numbers, 2.9e-3 at 40 million), so large tensors are summed in
chunks of 1,024 (1e-9). NaN and Inf propagate
through the norm, so that finding them costs nothing; telling them apart is done only for layers that have them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch.records import NonFinite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gradwatch.records import Floats

_LARGE = 1 << 18  # elements from which CPU tensors are summed in chunks
_CHUNK = 1 << 10
_FEW = 16  # tensors up to which reading one by one beats stacking, on CPU
_HALVES = (torch.float16, torch.bfloat16)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NormPlan:
    """How to measure one fixed list of tensors: which go together in one batched call, which go alone."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        self.alone: list[int] = []
        for index, tensor in enumerate(tensors):
            if _is_plain(tensor):
                together.setdefault((tensor.device, tensor.dtype), []).append(index)
            else:
                self.alone.append(index)
        self.groups = [(np.asarray(columns), columns, dtype) for (_, dtype), columns in together.items()]
        self.simple = len(self.groups) == 1 and not self.alone
        self.count = len(tensors)

    def norms(self, tensors: list[Tensor]) -> Floats:
        """Return the L2 norm of each tensor, shape (n,). One host copy per device and dtype, none on CPU."""
        if self.simple:
            return _batched(tensors, self.groups[0][2])
        norms = np.empty(self.count)
        for columns, indices, dtype in self.groups:
            norms[columns] = _batched([tensors[index] for index in indices], dtype)
        for index in self.alone:
            norms[index] = norm_of(tensors[index])
        return norms


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_floating_point()
        and tensor.numel() > 0
        and not (tensor.device.type == "cpu" and tensor.numel() >= _LARGE)
    )


def _batched(tensors: list[Tensor], dtype: torch.dtype) -> Floats:
    try:
        norms = (
            torch._foreach_norm(tensors, 2, dtype=torch.float32)
            if dtype in _HALVES
            else torch._foreach_norm(tensors, 2)
        )
    except (RuntimeError, NotImplementedError):  # a gradient that is sparse although its parameter is dense
        return np.array([norm_of(tensor) for tensor in tensors])
    if len(norms) < _FEW and norms[0].is_cpu:
        return np.array([norm.item() for norm in norms])
    return torch.stack(norms).detach().cpu().numpy().astype(np.float64)


def norm_of(tensor: Tensor) -> float:
    """Return the L2 norm of one tensor of any layout, dtype and size; 0.0 when it is empty."""
    values = _values(tensor)
    if not values.numel():
        return 0.0
    wide = torch.float64 if values.dtype is torch.float64 else torch.float32
    flat = values.reshape(-1)
    whole = flat.numel() - flat.numel() % _CHUNK if flat.numel() >= _LARGE and flat.is_cpu else 0
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    if not whole:
        return float(rest.item())
    chunks = torch.linalg.vector_norm(flat[:whole].view(-1, _CHUNK), dim=1, dtype=wide)
    return math.hypot(torch.linalg.vector_norm(chunks, dtype=torch.float64).item(), rest.item())


def _values(tensor: Tensor) -> Tensor:
    """The tensor's real elements: coalesced values of a sparse one, both parts of a complex one."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def global_norm_of(norms: Floats) -> float:
    """Return the L2 norm of all gradients as one vector from their norms; not finite where one of them is not."""
    return math.sqrt(np.dot(norms, norms))


def look_closer(tensor: Tensor) -> tuple[int, int, float]:
    """Return the counts of NaN and of infinite elements, and the norm in float64.

    The norm is taken after dividing by the largest magnitude, so that neither overflow nor underflow of the squares can
    make it infinite or zero; it is NaN when an element is not finite.
    """
    values = _values(tensor)
    if not values.numel():
        return 0, 0, 0.0
    nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
    if nans or infs:
        return nans, infs, math.nan
    return 0, 0, scaled_norm(values)


def scaled_norm(values: Tensor) -> float:
    """Return the L2 norm of finite values in float64, safe from overflow and underflow of the squares."""
    values = _values(values)
    low, high = torch.aminmax(values)
    largest = max(-low.item(), high.item())
    if largest == 0:
        return 0.0
    return float(largest * torch.linalg.vector_norm(values.double() / largest).item())


def code_of(nans: int, infs: int) -> NonFinite:
    """Return which kinds of non-finite elements there are."""
    return (NonFinite.NAN if nans else NonFinite.NONE) | (NonFinite.INF if infs else NonFinite.NONE)


def live_units(gradient: Tensor) -> Tensor:
    """Return which units (rows along the first dimension) have a gradient other than zero, bool of shape (units,)."""
    # the sum of magnitudes, not of squares: tiny values must not underflow to zero
    size: Tensor = torch.linalg.vector_norm(gradient.detach().flatten(1), ord=1, dim=1)
    return size.bool()


def fingerprint(tensor: Tensor) -> int:
    """Return the sum of the tensor's bits read as integers: a change of one element changes it, of many almost surely."""
    values = _values(tensor)
    return int(values.view(_BITS[values.element_size()]).sum(dtype=torch.int64).item())
