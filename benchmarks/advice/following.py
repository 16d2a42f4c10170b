"""How a piece of advice is followed without knowing the training: by a change to its rates, its gradients or its modules."""

from __future__ import annotations

import math
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
        cap: the largest learning rate.
        anew: names of modules or parameters that are initialised anew; "": all of them, by He.
        no_growth: whether a negative weight decay is set to zero.
        less_decay: factor on the weight decay.
        gates: whether vanilla recurrent layers become LSTMs of the same sizes.
        open_gates: whether the forget gates of these begin open: at a bias of ln(T) for the T steps of the first batch.
        orthogonal: whether recurrent weights begin orthogonal.
        standard: whether inputs are scaled to zero mean and unit variance, those of the first batch.
    """

    rate: float = 1.0
    warm_up: int = 0
    clip: bool = False
    bound: float | None = None
    decay: float = 0.0
    swap: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = ()
    cap: float = math.inf
    anew: tuple[str, ...] = ()
    no_growth: bool = False
    less_decay: float = 1.0
    gates: bool = False
    open_gates: bool = False
    orthogonal: bool = False
    standard: bool = False

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
            cap=min(self.cap, other.cap),
            anew=self.anew + other.anew,
            no_growth=self.no_growth or other.no_growth,
            less_decay=self.less_decay * other.less_decay,
            gates=self.gates or other.gates,
            open_gates=self.open_gates or other.open_gates,
            orthogonal=self.orthogonal or other.orthogonal,
            standard=self.standard or other.standard,
        )


_RATE = r"(?:Lower|Raise) the learning rate.*: ([\d.,e-]+) instead of (?:the )?([\d.,e-]+)(?:[.,] | that is set)"
_READ: tuple[tuple[str, Callable[..., tuple[Change, ...]]], ...] = (
    (
        r"Raise the learning rate: ([\d.,e-]+) instead of ([\d.,e-]+), .* then by factors of ten",
        lambda new, old: tuple(Change(rate=times * _number(new) / _number(old)) for times in (1, 10, 100, 1000)),
    ),
    (_RATE, lambda new, old: (Change(rate=_number(new) / _number(old)),)),
    (r"The learning rate has risen .* keep it below ([\d.,e-]+)\.( |$)", lambda cap, _: (Change(cap=_number(cap)),)),
    (r"The learning rate was raised .* go back to ([\d.,e-]+), ", lambda cap: (Change(cap=_number(cap)),)),
    (r".*clip each step to a norm of ([\d.,e-]+), ", lambda bound: (Change(bound=_number(bound)),)),
    (r"Initialise the recurrent weights orthogonally", lambda: (Change(orthogonal=True),)),
    (r"Initialise the weights anew", lambda: (Change(anew=("",)),)),
    (r"Initialise (?:module )?(\S+) anew", lambda name: (Change(anew=(name,)),)),
    (r"The weight decay of a parameter group is -", lambda: (Change(no_growth=True),)),
    (
        r"Lower the weight decay: ([\d.,e-]+) instead of ([\d.,e-]+)\. ",
        lambda new, old: (Change(less_decay=_number(new) / _number(old)),),
    ),
    (r"Lower the learning rate", lambda: (Change(rate=_LOWER),)),
    (r"Change the learning rate", lambda: tuple(Change(rate=factor) for factor in (3.0, 1 / 3, 9.0, 1 / 9))),
    (r"Warm the rate up", lambda: (Change(warm_up=_WARM),)),
    (r"(?:Clip by norm|If single batches cause it, clip|Skip such steps)", lambda: (Change(clip=True),)),
    (r"Put an L2 penalty", lambda: (Change(decay=_DECAY),)),
    (r"Use ReLU-like activations", lambda: (Change(swap=((nn.Tanh, nn.ReLU), (nn.Sigmoid, nn.ReLU))),)),
    (r"Use an LSTM or GRU .* gates that begin open", lambda: (Change(gates=True, open_gates=True),)),
    (r"Use an LSTM or GRU", lambda: (Change(gates=True),)),
    (r"Scale the inputs", lambda: (Change(standard=True),)),
    (r"Use LeakyReLU", lambda: (Change(swap=((nn.ReLU, nn.LeakyReLU),)),)),
)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def changes_for(advice: str) -> tuple[Change, ...]:
    """Return the changes by which a user may follow a piece of advice, each a way of its own; none if it names no change."""
    found = ((re.match(pattern, advice), make) for pattern, make in _READ)
    return next((make(*match.groups()) for match, make in found if match is not None), ())


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
        self._decays: list[float] = []
        self._handles: list[Any] = []
        self._replaced: dict[int, nn.Parameter] = {}  # new parameters by the ids of those that the optimizer holds
        self._old: list[nn.Module] = []  # kept, so that no other parameter gets one of these ids
        self.monitor: gradwatch.Monitor | None = None
        self.changed = not (change.swap or change.gates or change.orthogonal or change.standard)

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        for old, new in self._change.swap:
            self.changed |= swapped(model, old, new)
        for name in self._change.anew:
            _initialise(model if not name else part_of(model, name))
        if self._change.gates:
            self._gate(model)
        if self._change.orthogonal:
            self.changed |= orthogonal(model)
        if self._change.standard:
            self._handles.append(model.register_forward_pre_hook(Standard(self)))
        super().watch(model)
        if self._change.clip:
            self.monitor = gradwatch.attach(model, report=None, clip="norm")
        self._handles += [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def _gate(self, model: nn.Module) -> None:
        for parent, name, old in _parts_of(model, nn.RNN):
            new = gated(old, open_gates=self._change.open_gates)
            setattr(parent, name, new)
            self._replaced |= {id(one): two for one, two in zip(old.parameters(), new.parameters(), strict=True)}
            self._old.append(old)
            self.changed = True

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        change = self._change
        for group in optimizer.param_groups if self._replaced else ():
            group["params"] = [self._replaced.get(id(one), one) for one in group["params"]]
        warmth = min(1.0, (self._made + 1) / change.warm_up) if change.warm_up else 1.0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        held = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        with torch.no_grad():
            for parameter in held if change.decay else ():
                parameter.grad.add_(parameter.detach(), alpha=change.decay)
            if change.bound is not None:
                nn.utils.clip_grad_norm_(held, change.bound)
        for group in optimizer.param_groups:
            group["lr"] = min(group["lr"] * change.rate * warmth, change.cap)
            if "weight_decay" in group:
                group["weight_decay"] *= 0.0 if change.no_growth and group["weight_decay"] < 0 else change.less_decay
        self._made += 1

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, rate, decay in zip(optimizer.param_groups, self._rates, self._decays, strict=True):
            group["lr"] = rate
            if "weight_decay" in group:
                group["weight_decay"] = decay

    def close(self) -> None:
        """Remove what was attached."""
        for handle in self._handles:
            handle.remove()
        if self.monitor is not None:
            self.monitor.detach()


class Standard:
    """A hook that scales the float inputs of a model by the mean and deviation of each feature in the first batch.

    Args:
        following: whose ``changed`` is set where there is such an input.
    """

    def __init__(self, following: Following) -> None:
        self._following = following
        self._scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self._scaled(place, one) for place, one in enumerate(inputs))

    def _scaled(self, place: int, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return value
        if place not in self._scales:
            others = tuple(dim for dim in range(value.ndim) if dim != (1 if value.ndim > 3 else value.ndim - 1))
            self._scales[place] = value.mean(others, keepdim=True), value.std(others, keepdim=True).clamp_min(1e-8)
            self._following.changed = True
        mean, deviation = self._scales[place]
        return (value - mean) / deviation


def gated(old: nn.RNN, *, open_gates: bool) -> nn.LSTM:
    """Return an LSTM of the sizes of a vanilla recurrent layer; its forget gates begin open for the steps of the first batch."""
    new = nn.LSTM(
        old.input_size, old.hidden_size, old.num_layers, old.bias, old.batch_first, old.dropout, old.bidirectional
    )

    def open_them(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        handle.remove()
        steps = inputs[0].shape[1 if old.batch_first else 0]
        with torch.no_grad():
            for name, bias in new.named_parameters():
                if name.startswith("bias_hh"):  # torch's order of gates: in, forget, cell, out
                    bias[old.hidden_size : 2 * old.hidden_size] = math.log(steps)

    handle = new.register_forward_pre_hook(open_them)
    if not open_gates:
        handle.remove()
    return new


def orthogonal(model: nn.Module) -> bool:
    """Make the recurrent weights of a model orthogonal; return whether there are any."""
    found = [one for name, one in model.named_parameters() if "weight_hh" in name]
    for weight in found:
        for part in weight.detach().split(weight.shape[1]):  # a gate each
            nn.init.orthogonal_(part)
    return bool(found)


def _parts_of(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]


def swapped(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> bool:
    """Replace the modules of class ``old`` by new ones, initialised for rectifiers; return whether there were any."""
    found = _parts_of(model, old)
    for parent, name, _ in found:
        setattr(parent, name, new())
    if found and old in (nn.Tanh, nn.Sigmoid):
        _initialise(model)
    return bool(found)


def part_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, or the one that holds the parameter of this name."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    return modules[name] if name in modules else modules[name.rpartition(".")[0]]


def _initialise(model: nn.Module) -> None:
    reset: Callable[[torch.Tensor], Any] = nn.init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            reset(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
