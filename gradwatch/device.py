"""Where tensors lie, and what may be asked of them there."""

from __future__ import annotations

import torch


def reading_is_free(device: torch.device) -> bool:
    """True where a tensor's value can be had without waiting for a device."""
    return device.type == "cpu"


def precise(device: torch.device) -> torch.dtype:
    """Return the widest float of a device: Metal has no float64, and there norms above 1e19 read as infinite."""
    return torch.float32 if device.type == "mps" else torch.float64


def capturing() -> bool:
    """True while work on the current CUDA stream is not done but captured into a graph: nothing may be asked or started.

    True, too, where the device does not even answer that: its error belongs to the training, not here.
    """
    try:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    except Exception:
        return True
