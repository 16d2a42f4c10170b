"""Devices: what can be read there without waiting, how tensors move, the widest float, whether a graph is captured."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ORDINARY = ("cpu", "meta", "cuda", "mps", "xpu")


def reading_is_free(device: torch.device) -> bool:
    """Return whether values of tensors on ``device`` can be read without waiting."""
    return device.type == "cpu"


@lru_cache(maxsize=64)
def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device: float64, or float32 on Metal and on Intel GPUs without float64.

    In float32, norms above 1e19 become infinite.
    """
    if device.type in ("cpu", "meta", "cuda"):
        return torch.float64
    if device.type in ("mps", "xpu"):
        return torch.float64 if device.type == "xpu" and _has_float64(device) else torch.float32
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum()
    except Exception:
        return torch.float32
    return torch.float64


def _has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", False))


def moved(tensor: Tensor, home: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on another device, in another dtype if given, that can be used at once.

    Only a copy to CUDA does not wait. A copy to the CPU waits, because an asynchronous one would be read before it has
    arrived; other devices could read memory of the host that has been freed by then.
    """
    return tensor.to(home, dtype or tensor.dtype, non_blocking=home.type == "cuda")


class Copies:
    """A tensor that is needed on several devices, copied once to each of them."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._kept = {tensor.device: tensor}

    def on(self, home: torch.device) -> Tensor:
        """Return the tensor on ``home``."""
        if home not in self._kept:
            self._kept[home] = moved(self._tensor, home)
        return self._kept[home]


def capturing() -> bool:
    """Return whether the current stream is being captured into a graph, so that no value may be read or transferred.

    True as well if the query itself fails: the error of the device belongs to the training.
    """
    try:
        if torch.cuda.is_initialized():
            return torch.cuda.is_current_stream_capturing()
        # torch 2.6 knows no graphs there
        asked = getattr(torch.xpu, "is_current_stream_capturing", None) if torch.xpu.is_initialized() else None
        return bool(asked()) if asked is not None else False
    except Exception:
        return True


def is_over(event: Any) -> bool:
    """Return whether the work before an event is over. False as well if that may not be asked now.

    While another thread captures a graph, CUDA refuses the question, and does not say so in this thread.
    """
    try:
        return bool(event.query())
    except Exception:
        return False


def unreadable(device: torch.device) -> str | None:
    """Return why the numbers of a device could never be read without stopping the training, or None if they can."""
    if device.type in _ORDINARY:
        return None
    try:
        torch.Event(device)
        torch.accelerator.current_stream(device)
    except Exception:
        return f"its parameters lie on {device}, which offers no events that say when a copy to the host has arrived"
    return None
