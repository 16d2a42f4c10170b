"""Statistics of the tensors in a batch, for the report on a batch that may have caused an incident."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 32  # tensors


def numbers_of(batch: Any) -> list[dict[str, Any]]:
    """Return the name, shape, dtype and statistics of each tensor in a batch, up to 32 tensors.

    The statistics are the smallest and largest value, mean and standard deviation of the finite elements (None if there are
    none), and the numbers of NaN and infinite elements. For complex tensors they are those of the magnitudes. Reads the tensors
    on the host, so it is too slow for every step.

    Args:
        batch: a tensor, or tensors in lists, tuples and dicts. Other objects and tensors that are not strided are ignored.
    """
    told: list[dict[str, Any]] = []
    for name, tensor in _tensors(batch, ""):
        if len(told) == _MOST:
            break
        flat = tensor.detach().flatten()
        values = flat.abs().double() if flat.is_complex() else flat.double()
        finite = values[torch.isfinite(values)]
        told.append(
            {
                "name": name or "batch",
                "shape": list(tensor.shape),
                "type": str(tensor.dtype).removeprefix("torch."),
                "smallest": finite.min().item() if finite.numel() else None,
                "largest": finite.max().item() if finite.numel() else None,
                "mean": finite.mean().item() if finite.numel() else None,
                "deviation": finite.std(correction=0).item() if finite.numel() else None,
                "nan": int(torch.isnan(values).sum().item()),
                "inf": int(torch.isinf(values).sum().item()),
            }
        )
    return told


def _tensors(batch: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(batch, torch.Tensor):
        if batch.layout is torch.strided:
            yield name, batch
    elif isinstance(batch, dict):
        for key, one in batch.items():
            yield from _tensors(one, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, (list, tuple)):
        for index, one in enumerate(batch):
            yield from _tensors(one, f"{name}[{index}]")
