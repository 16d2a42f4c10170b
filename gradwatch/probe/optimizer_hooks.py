"""The process-wide pair of optimizer hooks that serves all probes."""

from __future__ import annotations

import sys
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
    """The methods that the hooks call, in addition to those that patches call."""

    def captured(self, optimizer: Optimizer) -> None:
        """Called when a step of an optimizer is captured into a CUDA graph, which replays it without calling hooks."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before an optimizer steps; return other arguments for its step, or None."""

    def before_step_without_hook(self, optimizer: Any) -> None:
        """Called instead before an optimizer steps that torch's hooks do not see."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after an optimizer has stepped."""


_probes: tuple[weakref.ref[StepListener], ...] = ()
_handles: list[RemovableHandle] = []


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    if device.capturing():
        return _captured(optimizer)
    if (kwargs or len(args) > 1) and _only_makes_state(optimizer):
        return None
    changed, meant = None, None
    for ref in _probes:
        probe = ref()
        if probe is None:
            continue
        try:  # like `gradwatch.probe.patches.tell`, but each may change the arguments of the next
            changed = probe.before_step(optimizer, args, kwargs) or changed
        except Exception as error:
            meant = let_out(probe, error) or meant
        args, kwargs = changed or (args, kwargs)
    if meant is not None:
        raise meant
    return changed


def _captured(optimizer: Optimizer) -> None:
    tell([probe for ref in _probes if (probe := ref()) is not None], "captured", optimizer)


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Return whether the step is one of torch's distributed checkpoints, which make the state that an optimizer has not yet.

    They do so by a step with gradients and rates of zero, ``step(closure=None)``, before they save or load.
    """
    rate = next(iter(optimizer.param_groups), {}).get("lr", 0.0)
    if not (rate.is_cpu and not rate.any() if isinstance(rate, torch.Tensor) else rate == 0):
        return False
    makes: Any = getattr(sys.modules.get("torch.distributed.checkpoint.state_dict"), "_init_optim_state", None)
    frame = sys._getframe() if makes is not None else None
    while frame is not None and frame.f_code is not makes.__code__:
        frame = frame.f_back
    return frame is not None


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if device.capturing() or ((kwargs or len(args) > 1) and _only_makes_state(optimizer)):
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
    """Call ``probe``, which is held weakly, before and after every optimizer step in this process."""
    global _probes  # noqa: PLW0603  one for the process
    if not _handles:
        # a compiled optimizer step breaks its graph once here instead of tracing into the monitor
        _handles.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_any_step)))
        _handles.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_any_step)))
    _probes += (weakref.ref(probe),)


def unlisten(probe: StepListener) -> None:
    """Stop calling ``probe``; the hooks are removed with the last one."""
    global _probes  # noqa: PLW0603
    _probes = tuple(ref for ref in _probes if ref() not in (None, probe))
    if not _probes:
        for handle in _handles:
            handle.remove()
        _handles.clear()
