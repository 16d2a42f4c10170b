"""Running a model again without a trace: on stand-ins of its weights, copies of its buffers and with its state put back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.capture import captures
from gradwatch.forensics.casts import cast_in_place_of
from gradwatch.measure.wrappers import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_CONTAINERS = (list, dict, set, deque, OrderedDict)


class CannotRepeatError(Exception):
    """Raised for a model or a call that cannot be run again without changing something."""


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let a model run on stand-ins, and put back everything that its modules hold; yields the stand-ins of its weights.

    The stand-in of a weight shares its values, but has no hooks and a gradient of its own. Buffers and other tensors that
    modules hold are copied. Hooks of the user are left out, those of torch, such as of `weight_norm`, are run. Those of FSDP2
    only cast.
    """
    if any(isinstance(one, torch.jit.ScriptModule) for one in model.modules()):
        raise CannotRepeatError("a module of TorchScript cannot be run on other weights")
    if any(is_dtensor(one) for one in model.parameters()):
        raise CannotRepeatError("its weights are spread over processes")
    with copied_state(model, weights=True) as copies:
        yield [one for one in copies if isinstance(one, nn.Parameter)]


@contextmanager
def copied_state(model: nn.Module, *, weights: bool = False) -> Iterator[list[torch.Tensor]]:
    """Let a model run on copies of its buffers, and put back everything that its modules hold; yields what stands in for it.

    Args:
        model: the model.
        weights: whether its weights have stand-ins too.
    """
    saved = [(module, dict(module.__dict__), _contents(module)) for module in model.modules()]
    copies: dict[int, torch.Tensor] = {}
    try:
        for module, _, _ in saved:
            _replace(module, copies, weights=weights)
        yield list(copies.values())
    finally:
        for module, state, contents in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            for container, kept in contents:
                _put_back(container, kept)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the lists, dicts and sets that a module holds, each with a copy."""
    return [(value, value.copy()) for value in module.__dict__.values() if type(value) in _CONTAINERS]


def _put_back(container: Any, kept: Any) -> None:
    if isinstance(container, list):
        container[:] = kept
    elif isinstance(container, deque):
        container.clear()
        container.extend(kept)
    else:
        container.clear()
        container.update(kept)


def _replace(module: nn.Module, copies: dict[int, torch.Tensor], *, weights: bool) -> None:
    state = module.__dict__
    if weights:
        state["_parameters"] = {name: _stand_in(one, copies) for name, one in state["_parameters"].items()}
    state["_buffers"] = {name: _copy(one, copies) for name, one in state["_buffers"].items()}
    for name, value in list(state.items()):
        if type(value) is torch.Tensor:
            state[name] = _copy(value, copies)
    for name in _HOOKS:
        hooks = state.get(name)
        if hooks:
            if weights and name == "_forward_hooks":
                hooks = _until_captured(hooks)
            kept = {key: _kept(hook, name, module, weights=weights) for key, hook in hooks.items()}
            state[name] = OrderedDict((key, hook) for key, hook in kept.items() if hook is not None)


def _stand_in(parameter: Any, copies: dict[int, torch.Tensor]) -> Any:
    if parameter is None:
        return None
    if id(parameter) not in copies:
        copies[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copies[id(parameter)]


def _copy(tensor: Any, copies: dict[int, torch.Tensor]) -> Any:
    if tensor is None:
        return None
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return copies[id(tensor)]


def _until_captured(hooks: dict[int, Any]) -> dict[int, Any]:
    """Return the hooks of a forward up to the one that has kept the output, which is compared as it was then."""
    place = next((place for place, hook in enumerate(hooks.values(), 1) if captures(hook)), None)
    return dict(islice(hooks.items(), place))


def _kept(hook: Any, name: str, module: nn.Module, *, weights: bool) -> Any:
    """Return what is run in place of a hook: itself if it is one of torch; None for one of the user's.

    Those of FSDP2 only cast if weights have stand-ins, which need not be gathered.
    """
    function = getattr(hook, "func", hook)
    kind = getattr(function, "__module__", None) or type(function).__module__
    if weights and kind.startswith("torch.distributed.fsdp."):
        return cast_in_place_of(name, module)
    return hook if kind == "torch" or kind.startswith("torch.") else None


@contextmanager
def generators_kept(state: torch.Tensor | None = None) -> Iterator[None]:
    """Put back the states of all generators at the end; begin with ``state`` on the CPU if one is given."""
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = list(range(len(torch.cuda.default_generators))) if ready else []
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    kept = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=devices):
        if state is not None:
            torch.default_generator.set_state(state)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(kept)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules as they are written, or the dispatch mode would keep them from ever being compiled again."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
