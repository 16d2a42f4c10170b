"""What FSDP2 casts under its policies of mixed precision, for a forward that is repeated without FSDP2's hooks.

Each module to which `fully_shard` was applied has a policy of its own. Its weights are cast when they are gathered, its inputs
before its forward, and its outputs after it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which `fully_shard` was applied."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [one for one in model.modules() if kind is not None and isinstance(one, kind)]


def casts(model: nn.Module) -> bool:
    """Return whether FSDP2 runs a part of a model in another dtype than that of its weights."""
    return any(_casts(one._get_fsdp_state()) for one in sharded_modules(model))


def can_cast_again(model: nn.Module) -> bool:
    """Return whether all that FSDP2 casts can be cast without its hooks. Not all versions of torch have functions for that."""
    states = [one._get_fsdp_state() for one in sharded_modules(model)]
    return all(not _casts(one) or hasattr(one, "_cast_forward_inputs") for one in states)


def _casts(state: Any) -> bool:
    policy = getattr(state, "_mp_policy", None)
    return policy is None or policy.param_dtype is not None or policy.output_dtype is not None


def cast_in_place_of(kind: str, module: nn.Module) -> Callable[..., Any] | None:
    """Return a hook that does no more than cast what FSDP2's hook casts; None if it casts nothing.

    Args:
        kind: name of the dict of the hooks of a module in which it is.
        module: the module.
    """
    state_of: Any = getattr(module, "_get_fsdp_state", None)
    state = state_of() if state_of is not None else None
    if state is None or not _casts(state):
        return None
    if kind == "_forward_pre_hooks":
        return lambda _, args, kwargs: state._cast_forward_inputs(args, kwargs)
    if kind == "_forward_hooks":
        return lambda _, __, output: state._cast_output_dtype(output)
    return None
