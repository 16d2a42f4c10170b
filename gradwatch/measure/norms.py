"""Per-layer L2 norms in one batched call, and a closer look at layers whose norm is not finite.

Squares are accumulated in float32 (float64 for double), because a float16 norm of a healthy tensor overflows. On the CPU, float32
sums over many elements lose digits (3e-5 at 32 thousand equal numbers, 2.9e-3 at 40 million), so tensors of 32,768 elements and
more are summed in pieces of at most 512; their error is then at most 5e-7. NaN and Inf propagate through the norm, so finding
them costs nothing; only layers that have them are examined further.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.measure.wrappers import is_dtensor, local_of
from gradwatch.records import NonFinite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from gradwatch.records import Floats

_LARGE = 1 << 15  # elements from which CPU tensors are summed in pieces
_LONGEST, _SHORTEST = 1 << 9, 1 << 7  # elements of a piece; a float32 sum of 1,024 equal elements is off by 1e-6
AT_ONCE = 1 << 18  # elements from which work that copies them into a wider dtype goes in pieces
_FEW = 16  # tensors below which reading one by one is faster than stacking, on the CPU
_ORDINARY = (torch.Tensor, torch.nn.Parameter)  # subclasses may override operations, so they are measured one by one
_DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)
)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NormPlan:
    """A plan for measuring one list of tensors: which are batched, which are summed in pieces, which are measured alone."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        # large tensors: index and length of a piece; the last piece may be shorter
        self._pieces: list[tuple[int, int]] = []
        self._alone: list[int] = []
        for index, tensor in enumerate(tensors):
            if _is_large(tensor):
                self._pieces.append((index, _piece(tensor.numel())))
            elif _is_plain(tensor):
                together.setdefault((tensor.device, tensor.dtype), []).append(index)
            else:
                self._alone.append(index)
        self._groups = [(np.asarray(indices), indices, _wide(tensors[indices[0]])) for indices in together.values()]
        self._picks = [(columns, _picker(indices), wide) for columns, indices, wide in self._groups]
        self._simple = len(self._groups) == 1 and not self._alone and not self._pieces
        self._not_empty = [index for index in self._alone if tensors[index].numel()]
        self._large = np.array([index for index, _ in self._pieces], dtype=np.intp)
        counts = [-(-tensors[index].numel() // piece) for index, piece in self._pieces]
        self._starts = np.cumsum([0, *counts[:-1]], dtype=np.intp)
        self._alone_on = [index for index, _ in self._pieces] + self._alone
        self._count = len(tensors)
        self.devices = [tensor.device for tensor in tensors]
        self.device = self.devices[0]
        self._order: Tensor | None = None

    def norms(self, tensors: list[Tensor]) -> Floats:
        """Return the L2 norm of each tensor on the host, float64 of shape (n,). Use it only where reading is free."""
        if self._simple:
            return _read(_batched(tensors, self._groups[0][2]))
        norms = np.zeros(self._count)
        for columns, pick, wide in self._picks:
            norms[columns] = _read(_batched(pick(tensors), wide))
        if self._pieces:
            norms[self._large] = self._in_pieces(tensors)
        for index in self._not_empty:
            norms[index] = norm_of(tensors[index])
        return norms

    @property
    def shareable(self) -> bool:
        """True if `torch.nn.utils.clip_grad_norm_` computes the same norms: float32 tensors on the CPU in one group."""
        dtypes = {wide for _, _, wide in self._groups}
        return len(self._groups) <= 1 and not self._alone and dtypes <= {torch.float32} and self.device.type == "cpu"

    def shared(self, tensors: list[Tensor]) -> tuple[Floats, Tensor]:
        """Return the L2 norm of each tensor as `norms` does, and the global norm bit-identical to `clip_grad_norm_`'s."""
        together = torch.stack(torch._foreach_norm(tensors, 2.0))
        norms = together.numpy().astype(np.float64)
        if self._pieces:
            norms[self._large] = self._in_pieces(tensors)
        return norms, torch.linalg.vector_norm(together, 2.0)

    def _in_pieces(self, tensors: list[Tensor]) -> Floats:
        """Return the norms of the large tensors: the pieces in float32, their squares added in float64."""
        parts = []
        for index, piece in self._pieces:
            parts += _piecewise(tensors[index], piece, torch.float32)
        squares = torch.cat(parts).numpy().astype(np.float64)
        squares *= squares
        summed: Floats = np.sqrt(np.add.reduceat(squares, self._starts))
        return summed

    def norms_on(self, home: torch.device, tensors: list[Tensor]) -> Tensor:
        """Return the L2 norm of each tensor, shape (n,), on ``home`` in its widest float. Nothing is read on the host."""
        parts = [
            torch.stack(_batched([tensors[index] for index in indices], wide)) for _, indices, wide in self._groups
        ]
        parts += [norm_tensor(tensors[index]).view(1) for index in self._alone_on]
        parts = [device.moved(part, home, device.widest_float(home)) for part in parts]
        if self._simple:
            return parts[0]
        if self._order is None:
            placed = [index for _, indices, _ in self._groups for index in indices] + self._alone_on
            self._order = on_device(np.argsort(placed), home)
        return torch.cat(parts)[self._order]


def unfit(tensor: Tensor) -> str | None:
    """Return why the norm of a tensor cannot be computed, or None if it can. For a subclass it is tried out."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        return f"of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in _DTYPES:
        return f"of type {str(tensor.dtype).removeprefix('torch.')}"
    if type(tensor) in _ORDINARY or is_dtensor(tensor):
        return None
    try:
        norm_of(tensor)
    except Exception as error:
        return f"of class {type(tensor).__name__}, whose norm raises {type(error).__name__}"
    return None


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_floating_point()
        and type(tensor) in _ORDINARY
        and not tensor.is_nested
        and tensor.numel() > 0
        and not (tensor.is_cpu and (tensor.numel() >= _LARGE or not _is_dense(tensor)))
    )


def _is_large(tensor: Tensor) -> bool:
    """Return True for tensors that are summed in pieces of float32."""
    plain = tensor.layout is torch.strided and tensor.dtype is torch.float32 and type(tensor) in _ORDINARY
    return plain and tensor.is_cpu and tensor.numel() >= _LARGE


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill the memory without gaps, in any order.

    Torch sums other tensors element by element and loses digits.
    """
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()


def _piece(elements: int) -> int:
    """Return the length of the pieces of a large tensor: a divisor of its size if possible, else the last is shorter."""
    return next((piece for piece in range(_LONGEST, _SHORTEST - 1, -1) if elements % piece == 0), _LONGEST)


def _piecewise(tensor: Tensor, piece: int, wide: torch.dtype) -> list[Tensor]:
    """Return the norms of the pieces of a tensor, and of the remainder if there is one."""
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    left = flat.numel() % piece
    if not left:
        return [torch.linalg.vector_norm(flat.view(-1, piece), dim=1, dtype=wide)]
    flat = flat.view(-1)
    rows = torch.linalg.vector_norm(flat[:-left].view(-1, piece), dim=1, dtype=wide)
    return [rows, _l2(flat[-left:], wide).view(1)]


def _picker(indices: list[int]) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """Return a function that returns the elements of a list at these indices as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda tensors: tuple(tensors[index] for index in indices)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype to accumulate in. On a device, overflowing squares cannot be measured again, so it is the widest."""
    if tensor.dtype is torch.float64 or not device.reading_is_free(tensor.device):
        return device.widest_float(tensor.device)
    return torch.float32


def _batched(tensors: list[Tensor] | tuple[Tensor, ...], wide: torch.dtype) -> list[Tensor]:
    try:
        return list(torch._foreach_norm(tensors, 2, dtype=wide))
    except (RuntimeError, NotImplementedError):  # a sparse gradient of a dense parameter
        return [norm_tensor(tensor) for tensor in tensors]


def _read(norms: list[Tensor]) -> Floats:
    if len(norms) < _FEW and norms[0].is_cpu:
        return np.array([norm.item() for norm in norms])
    together = torch.stack(norms)
    return (together if together.is_cpu else together.cpu()).numpy().astype(np.float64)


def norm_of(tensor: Tensor) -> float:
    """Return the L2 norm of one tensor of any supported layout and dtype; 0.0 if it is empty. Reads it on the host."""
    return float(norm_tensor(tensor).item())


def norm_tensor(tensor: Tensor) -> Tensor:
    """Return the L2 norm of one tensor as a tensor of shape () on its device. Only sparse tensors cause a host read."""
    values = _values(tensor)
    wide = _wide(values)
    if not values.numel():
        return torch.zeros((), dtype=wide, device=values.device)
    if not values.is_cpu:
        return _l2_on_device(values, wide)
    if values.numel() < _LARGE:
        return _l2(values.contiguous(), wide)
    return _l2(torch.cat(_piecewise(values, _LONGEST, wide)), torch.float64)


def _l2(values: Tensor, wide: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm


def _l2_on_device(values: Tensor, wide: torch.dtype) -> Tensor:
    if type(values) in _ORDINARY:
        return torch._foreach_norm((values,), 2, dtype=wide)[
            0
        ]  # unlike `vector_norm` it makes no copy in the wider dtype
    return _l2(values, wide)


def pieces_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor in pieces along its longest dimension, so that what is computed from one is small beside a gradient."""
    if tensor.numel() <= AT_ONCE:
        return (tensor,)
    longest = max(range(tensor.dim()), key=tensor.size)
    pieces: tuple[Tensor, ...] = tensor.split(max(1, tensor.size(longest) * AT_ONCE // tensor.numel()), longest)
    return pieces


def on_device(array: NDArray[Any], home: torch.device) -> Tensor:
    """Return ``array`` as a tensor on ``home``, its floats in the widest float there; CUDA does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if tensor.is_floating_point():
        tensor = tensor.to(device.widest_float(home))  # before the copy: there may be no float64 over there
    return device.moved(tensor.pin_memory() if home.type == "cuda" else tensor, home)


def _values(tensor: Tensor) -> Tensor:
    """Return the real elements that this process holds: coalesced values if sparse, real and imaginary parts if complex."""
    tensor = local_of(tensor.detach())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def global_norm_of(norms: Floats) -> float:
    """Return the L2 norm of all gradients as one vector, given their norms; not finite if one of them is not."""
    return math.sqrt(np.dot(norms, norms))


def count_nonfinite(tensor: Tensor) -> tuple[int, int, float]:
    """Return the numbers of NaN and infinite elements, and the norm in float64; the norm is NaN if one is not finite.

    The elements are divided by the largest magnitude first, so that squares neither overflow nor underflow.
    """
    values = _values(tensor)
    if not values.numel():
        return 0, 0, 0.0
    nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
    if nans or infs:
        return nans, infs, math.nan
    return 0, 0, scaled_norm(values)


def scaled_norm(values: Tensor) -> float:
    """Return the L2 norm of finite values in float64, without overflow or underflow of the squares."""
    values = _values(values)
    low, high = torch.aminmax(values)
    largest = max(-low.item(), high.item())
    if largest == 0:
        return 0.0
    return float(largest * torch.linalg.vector_norm(values.double() / largest).item())


def code_of(nans: int, infs: int) -> NonFinite:
    """Return the code for the kinds of non-finite elements that were counted."""
    return (NonFinite.NAN if nans else NonFinite.NONE) | (NonFinite.INF if infs else NonFinite.NONE)


def has_units(gradient: Tensor) -> bool:
    """Return True for gradients whose rows can be inspected: strided, of an ordinary class and not empty."""
    return gradient.layout is torch.strided and type(gradient) in _ORDINARY and gradient.numel() > 0


def live_units(gradient: Tensor) -> Tensor:
    """Return which units (rows along the first dimension) have a nonzero gradient, bool of shape (units,)."""
    gradient = gradient.detach()
    values = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    inner = tuple(range(1, values.dim()))
    # neither makes a copy of the gradient, and both propagate NaN
    return (values.amax(dim=inner) != 0) | (values.amin(dim=inner) != 0)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor as whole numbers with the same bits, over the same memory if `has_bits`."""
    values = _values(tensor)
    return values.view(_BITS[values.element_size()])


def has_bits(tensor: Tensor) -> bool:
    """Return whether writing to `bits_of` a tensor changes the tensor: it is strided, of an ordinary class, and no lazy view."""
    plain = tensor.layout is torch.strided and type(tensor) in _ORDINARY and not tensor.is_nested
    return plain and not (tensor.is_conj() or tensor.is_neg())


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor's elements with their bits read as integers.

    A change of one element always changes it, a change of several almost surely.
    """
    sums = [piece.sum(dtype=torch.int64) for piece in pieces_of(bits_of(tensor))]  # whose copies in int64 are small
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]
