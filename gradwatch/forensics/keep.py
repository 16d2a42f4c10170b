"""The batch of the step that failed, written beside the run log: tensors and plain values only, read by `gradwatch reproduce`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from gradwatch.forensics.call import Call
    from gradwatch.records import Origin

_PLAIN = (int, float, bool, str, type(None))


def keep(folder: Path, model: nn.Module, call: Call, origin: Origin) -> Path:
    """Write what a forward was of, its inputs, the state of the generator and the origin, and return the path of the file."""
    path = folder / f"batch-{max(origin.step, 0)}.pt"
    module = unwrapped(call.module)
    torch.save(
        {
            "module": next((name for name, one in unwrapped(model).named_modules() if one is module), ""),
            "args": _plain(list(call.args)),
            "kwargs": _plain(dict(call.kwargs)),
            "generator": call.generator,
            "step": origin.step,
            "origin": json.dumps(asdict(origin), default=str),
        },
        path,
    )
    return path


def _plain(value: Any) -> Any:
    """Return what `torch.load(weights_only=True)` reads; other objects become None."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, _PLAIN) else None
