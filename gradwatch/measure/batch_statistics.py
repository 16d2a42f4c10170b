"""What a batch looks like in numbers, for the moment in which it may be the culprit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 32  # tensors


def numbers_of(batch: Any) -> list[dict[str, Any]]:
    """Return name, shape, type, smallest, largest, mean and deviation, NaN and Inf of each tensor in a batch.

    ``batch`` is a tensor, or tensors in lists, tuples and dicts; of anything else nothing is said. Statistics are those of
    the finite elements, None where there are none. Reads the tensors' values: not for each step.
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
        for place, one in enumerate(batch):
            yield from _tensors(one, f"{name}[{place}]")
