"""The one process-wide pair of optimizer hooks that serves all probes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch import device

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from gradwatch.probe import Probe

_probes: tuple[weakref.ref[Probe], ...] = ()
_handles: list[RemovableHandle] = []


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    changed = None
    if device.capturing():
        return _captured()
    for ref in _probes:
        probe = ref()
        if probe is None:
            continue
        changed = probe.before_step(optimizer, args, kwargs) or changed
        args, kwargs = changed or (args, kwargs)
    return changed


def _captured() -> None:
    for ref in _probes:
        probe = ref()
        if probe is not None:
            probe.captured()


def _after_any_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if device.capturing():
        return
    for ref in _probes:
        probe = ref()
        if probe is not None:
            probe.after_step(optimizer)


def listen(probe: Probe) -> None:
    """Tell ``probe`` of every optimizer step in this process; it is held weakly."""
    global _probes  # noqa: PLW0603  it is one for the process
    if not _handles:
        # a compiled optimizer step breaks its graph once here instead of tracing into the monitor
        _handles.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_any_step)))
        _handles.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_any_step)))
    _probes += (weakref.ref(probe),)


def unlisten(probe: Probe) -> None:
    """Tell it no more; the last one to leave takes the hooks away."""
    global _probes  # noqa: PLW0603
    _probes = tuple(ref for ref in _probes if ref() not in (None, probe))
    if not _probes:
        for handle in _handles:
            handle.remove()
        _handles.clear()
