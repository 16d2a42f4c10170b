"""Properties of devices: whether reading is free, the widest float, and whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def reading_is_free(device: torch.device) -> bool:
    """Return whether values of tensors on ``device`` can be read without waiting."""
    return device.type == "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device: float64, or float32 on Metal, where norms above 1e19 become infinite."""
    return torch.float32 if device.type == "mps" else torch.float64


def capturing() -> bool:
    """Return whether the current CUDA stream is being captured into a graph, so that no value may be read or transferred.

    True as well if the query itself fails: the error of the device belongs to the training.
    """
    try:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    except Exception:
        return True
