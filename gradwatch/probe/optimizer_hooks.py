"""The one process-wide pair of optimizer hooks that serves all probes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch import device
from gradwatch.probe.patches import Listener, let_out, tell

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class StepListener(Listener, Protocol):
    """What the hooks tell, beside what patches tell."""

    def captured(self, optimizer: Optimizer) -> None:
        """A step of this optimizer is captured into a CUDA graph, which replays it without asking anybody."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step; return other arguments for it, or None."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has."""


_probes: tuple[weakref.ref[StepListener], ...] = ()
_handles: list[RemovableHandle] = []


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    if device.capturing():
        return _captured(optimizer)
    changed, meant = None, None
    for ref in _probes:
        probe = ref()
        if probe is None:
            continue
        try:  # as `gradwatch.probe.patches.tell`, and each may change the arguments of the next
            changed = probe.before_step(optimizer, args, kwargs) or changed
        except Exception as error:
            meant = let_out(probe, error) or meant
        args, kwargs = changed or (args, kwargs)
    if meant is not None:
        raise meant
    return changed


def _captured(optimizer: Optimizer) -> None:
    tell([probe for ref in _probes if (probe := ref()) is not None], "captured", optimizer)


def _after_any_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if device.capturing():
        return
    meant = None
    for ref in _probes:
        probe = ref()
        if probe is None:
            continue
        try:
            probe.after_step(optimizer)
        except Exception as error:
            meant = let_out(probe, error) or meant
    if meant is not None:
        raise meant


def listen(probe: StepListener) -> None:
    """Tell ``probe`` of every optimizer step in this process; it is held weakly."""
    global _probes  # noqa: PLW0603  it is one for the process
    if not _handles:
        # a compiled optimizer step breaks its graph once here instead of tracing into the monitor
        _handles.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_any_step)))
        _handles.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_any_step)))
    _probes += (weakref.ref(probe),)


def unlisten(probe: StepListener) -> None:
    """Tell it no more; the last one to leave takes the hooks away."""
    global _probes  # noqa: PLW0603
    _probes = tuple(ref for ref in _probes if ref() not in (None, probe))
    if not _probes:
        for handle in _handles:
            handle.remove()
        _handles.clear()
