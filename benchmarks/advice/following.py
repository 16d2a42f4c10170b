"""How a piece of advice is followed without knowing the training: by a change to its rates, its gradients or its modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradwatch
from benchmarks.faults.program import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

_TO_NUMBER = re.compile(r"^Lower the learning rate.*: ([\d.,e-]+) instead of ([\d.,e-]+)\. ")
_BOUND = re.compile(r"clip each step to a norm of ([\d.,e-]+)")
_WARM = 100  # steps over which the rate is warmed up, of the 400 of a program
_LOWER = 0.1  # factor on a rate that is to be lowered without a number
_DECAY = 1e-3  # of an L2 penalty


@dataclass(frozen=True)
class Change:
    """What is changed in a training.

    Attributes:
        rate: factor on every learning rate.
        warm_up: number of steps over which learning rates rise to their value.
        clip: whether auto-clip by norm is on.
        bound: norm to which each step is clipped; None: none is.
        decay: factor of an L2 penalty.
        swap: modules that are replaced, from a class to another.
    """

    rate: float = 1.0
    warm_up: int = 0
    clip: bool = False
    bound: float | None = None
    decay: float = 0.0
    swap: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = ()

    def with_(self, other: Change) -> Change:
        """Return both changes together."""
        return replace(
            self,
            rate=self.rate * other.rate,
            warm_up=max(self.warm_up, other.warm_up),
            clip=self.clip or other.clip,
            bound=other.bound if self.bound is None else self.bound,
            decay=max(self.decay, other.decay),
            swap=self.swap + other.swap,
        )


def changes_for(advice: str) -> tuple[Change, ...]:
    """Return the changes by which a user may follow a piece of advice, each a way of its own; none if it names no change."""
    numbers, bound = _TO_NUMBER.match(advice), _BOUND.search(advice)
    if numbers is not None:
        new, old = (float(text.replace(",", "")) for text in numbers.groups())
        return (Change(rate=new / old),)
    if bound is not None:
        return (Change(bound=float(bound[1].replace(",", ""))),)
    if advice.startswith("Lower the learning rate"):
        return (Change(rate=_LOWER),)
    if advice.startswith("Change the learning rate"):
        return tuple(Change(rate=factor) for factor in (3.0, 1 / 3, 9.0, 1 / 9))
    fixed = {
        "Warm the rate up": Change(warm_up=_WARM),
        "Clip by norm": Change(clip=True),
        "If single batches cause it, clip": Change(clip=True),
        "Skip such steps": Change(clip=True),
        "Put an L2 penalty": Change(decay=_DECAY),
        "Use ReLU-like activations": Change(swap=((nn.Tanh, nn.ReLU), (nn.Sigmoid, nn.ReLU))),
        "Use LeakyReLU": Change(swap=((nn.ReLU, nn.LeakyReLU),)),
    }
    return tuple(change for start, change in fixed.items() if advice.startswith(start))


class Following(Trace):
    """A recorded run in which a change is made.

    Attributes:
        monitor: the monitor, if auto-clip is on.
        changed: whether there was anything to change.
    """

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change
        self._made = 0
        self._rates: list[float] = []
        self._handles: list[Any] = []
        self.monitor: gradwatch.Monitor | None = None
        self.changed = not change.swap

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        for old, new in self._change.swap:
            self.changed |= swapped(model, old, new)
        super().watch(model)
        if self._change.clip:
            self.monitor = gradwatch.attach(model, report=None, clip="norm")
        if self._change != Change(swap=self._change.swap, clip=self._change.clip):
            self._handles = [
                register_optimizer_step_pre_hook(self._before),
                register_optimizer_step_post_hook(self._after),
            ]

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        change = self._change
        warmth = min(1.0, (self._made + 1) / change.warm_up) if change.warm_up else 1.0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        held = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        with torch.no_grad():
            for parameter in held if change.decay else ():
                parameter.grad.add_(parameter.detach(), alpha=change.decay)
            if change.bound is not None:
                nn.utils.clip_grad_norm_(held, change.bound)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * change.rate * warmth
        self._made += 1

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def close(self) -> None:
        """Remove what was attached."""
        for handle in self._handles:
            handle.remove()
        if self.monitor is not None:
            self.monitor.detach()


def swapped(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> bool:
    """Replace the modules of class ``old`` by new ones, initialised for rectifiers; return whether there were any."""
    found = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if type(child) is old
    ]
    for parent, name in found:
        setattr(parent, name, new())
    if found and old in (nn.Tanh, nn.Sigmoid):
        _initialise(model)
    return bool(found)


def _initialise(model: nn.Module) -> None:
    reset: Callable[[torch.Tensor], Any] = nn.init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            reset(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
