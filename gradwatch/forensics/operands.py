"""Numbers of a tensor: its range, its zeros and what is not finite in it. Reading them waits for a device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradwatch.measure.wrappers import local_of
from gradwatch.records import Operand

if TYPE_CHECKING:
    from torch import Tensor


def plain(tensor: Tensor) -> Tensor | None:
    """Return the part of a tensor whose elements can be read here, without its graph; None if there are none."""
    here = local_of(tensor.detach())
    if here.layout is not torch.strided or here.is_meta or not (here.is_floating_point() or here.is_complex()):
        return None
    here = torch.view_as_real(here.resolve_conj()) if here.is_complex() else here
    return here.float() if here.element_size() == 1 else here


def nonfinite_in(values: Tensor) -> Tensor:
    """Return which elements are NaN or infinite, several times as fast as `torch.isfinite` does."""
    return (values - values) != 0


def _with(values: Tensor, number: float) -> Tensor:
    """Return values in which a number stands for those that are not finite."""
    return values.nan_to_num(nan=number, posinf=number, neginf=number)


def is_nonfinite(tensor: Tensor) -> bool:
    """Return whether any element is NaN or infinite; False for integers."""
    here = plain(tensor)
    if here is None or not here.numel():
        return False
    # sums are many times as fast as minima; one of finite numbers may overflow, while what is not finite leaves NaN in the second
    return not math.isfinite(here.sum().item()) and bool((here - here).sum().item() != 0)


def has_nan(tensor: Tensor) -> bool:
    """Return whether any element is NaN."""
    here = plain(tensor)
    return here is not None and bool(here.numel()) and math.isnan(torch.aminmax(here).min.item())


def operand_of(name: str, tensor: Tensor) -> Operand:
    """Return the numbers of a tensor."""
    told = str(tensor.dtype).removeprefix("torch.")
    here = local_of(tensor.detach())
    shape = tuple(here.shape)
    if here.layout is not torch.strided or here.is_meta:
        return Operand(name, shape, told, elements=math.prod(shape))
    values = plain(here)
    values = here if values is None else values
    counts = {"elements": here.numel(), "zeros": here.numel() - int(torch.count_nonzero(here).item())}
    if not values.is_floating_point():
        low, high = (float(end.item()) for end in torch.aminmax(values)) if here.numel() else (math.nan, math.nan)
        return Operand(name, shape, told, low, high, **counts)
    bad = int(torch.count_nonzero(nonfinite_in(values)).item())
    low = high = math.nan
    if bad < values.numel():
        end = torch.finfo(values.dtype).max
        low, high = (
            float(choose(_with(values, number)).item()) for choose, number in ((torch.min, end), (torch.max, -end))
        )
    nans = int(torch.count_nonzero(torch.isnan(values)).item()) if bad else 0
    return Operand(name, shape, told, low, high, nans=nans, infs=bad - nans, **counts)


def rows_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the indices along the first dimension at which any element is not finite."""
    here = plain(tensor)
    if here is None or not here.dim():
        return ()
    bad = nonfinite_in(here)
    return tuple(torch.nonzero(bad.reshape(len(bad), -1).any(1) if bad.numel() else bad[:0]).flatten().tolist())
