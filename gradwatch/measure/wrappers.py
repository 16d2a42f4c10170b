"""Access to models and tensors inside wrappers: DistributedDataParallel, FSDP, DTensor, `torch.compile`, DeepSpeed.

Modules that the user has not imported are not imported here either, since no object of theirs can exist.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.measure import deepspeed

_IN_NAMES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MEGATRON = "Megatron-LM keeps gradients in main_grad"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside DistributedDataParallel, `torch.compile` and a DeepSpeed engine."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, kinds) or "_orig_mod" in model._modules or deepspeed.is_engine(model):
        model = model._orig_mod if "_orig_mod" in model._modules else model.module  # type: ignore[assignment]
    return model


def own_name(model: nn.Module) -> str:
    """Return the name of the user's own class."""
    inner = unwrapped(model)
    inner = inner._fsdp_wrapped_module if "_fsdp_wrapped_module" in inner._modules else inner  # type: ignore[assignment]
    kind = type(inner)
    # `fully_shard` derives a class from FSDPModule and the user's own
    return kind.__bases__[-1].__name__ if kind.__bases__[0].__name__ == "FSDPModule" else kind.__name__


def plain_name(name: str) -> str:
    """Return the name of a parameter without the parts that wrappers insert."""
    for part in _IN_NAMES:
        name = name.replace(part, "")
    return name


def is_dtensor(tensor: Any) -> bool:
    """Return True if ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds. Call it with autograd disabled."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def summed(gradient: torch.Tensor) -> torch.Tensor:
    """Return a distributed gradient with pending sums (`Partial` placements) reduced; other gradients are returned as is."""
    if not is_dtensor(gradient) or not any(placement.is_partial() for placement in gradient.placements):  # type: ignore[attr-defined]
        return gradient
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    whole = [replicate if placement.is_partial() else placement for placement in gradient.placements]  # type: ignore[attr-defined]
    return gradient.redistribute(placements=whole)  # type: ignore[attr-defined,no-any-return]


def replica_of(model: nn.Module) -> Any:
    """Return the DistributedDataParallel that is the model, a part of it, or a wrapper around it; None if there is none."""
    kind = nn.parallel.DistributedDataParallel
    for module in model.modules():
        if isinstance(module, kind):
            return module
    inner = unwrapped(model)
    # a wrapper that was built after attach; torch keeps no reference from a module to its wrapper
    # issubclass of the type, because some objects raise when they are asked for __class__
    return next((o for o in gc.get_objects() if issubclass(type(o), kind) and o.module is inner), None)


def optimizers_alive() -> list[Optimizer]:
    """Return every torch optimizer in this process, since torch keeps no reference from a parameter to its optimizer."""
    return [one for one in gc.get_objects() if issubclass(type(one), Optimizer) and hasattr(one, "param_groups")]


def is_fully_sharded(model: nn.Module) -> bool:
    """Return True under FSDP2's `fully_shard`, FSDP1 and ZeRO, where hooks on parameters do not fire or do harm."""
    module = sys.modules.get("torch.distributed.fsdp")
    kinds = (module.FSDPModule, module.FullyShardedDataParallel) if module is not None else ()
    if any(isinstance(part, kinds) for part in model.modules()):
        return True
    zero = deepspeed.zero_of(model)
    return zero is not None and zero.hides


def unreduced(model: nn.Module | None) -> list[torch.Tensor | None]:
    """Return the gradients that FSDP2 keeps while it accumulates without reducing."""
    found: list[torch.Tensor | None] = []
    module = sys.modules.get("torch.distributed.fsdp")
    if model is None or module is None:
        return found
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for one in (one for group in groups if group is not None for one in group.fsdp_params):
                whole = getattr(one, "_unsharded_param", None)
                found += [one.unsharded_accumulated_grad, whole.grad if whole is not None else None]
    return found


def flat_modules(model: nn.Module) -> list[Any]:
    """Return the FSDP1 modules of a model."""
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [m for m in model.modules() if isinstance(m, module.FullyShardedDataParallel)]


def whole_shapes(model: nn.Module) -> dict[int, torch.Size]:
    """Return the full shape of each parameter that FSDP1 or ZeRO's stage 3 shards, by the id of the local piece."""
    shapes = {id(one): one.ds_shape for one in model.parameters() if hasattr(one, "ds_shape")}
    for module in flat_modules(model):
        flat = getattr(module._handle, "flat_param", None)
        if flat is None:
            continue
        shapes[id(flat)] = flat._unpadded_unsharded_size
        for piece, shape in zip(flat._params or (), flat._shapes, strict=False):
            shapes[id(piece)] = shape
    return shapes


def unmeasurable(model: nn.Module | None = None, optimizer: Optimizer | None = None) -> str | None:
    """Return why the gradients of this model cannot be seen, or None if they can.

    Without this check gradwatch would report zeros.
    """
    kinds = [kind for thing in (model, optimizer) for kind in type(thing).__mro__]
    if any(kind.__module__.split(".")[0] == "megatron" for kind in kinds):
        return _MEGATRON
    if model is None:
        return None
    if any(hasattr(parameter, "main_grad") for parameter in model.parameters()):
        return _MEGATRON
    return deepspeed.refusal(model)


def version_of(gradient: Tensor) -> int:
    """Return the number of in-place changes of a tensor; 0 for inference tensors, which do not count them."""
    if type(gradient) is torch.Tensor:
        return 0 if gradient.is_inference() else gradient._version
    part = getattr(gradient, "_local_tensor", None)  # FSDP2 changes it without changing the version of the DTensor
    return sum(one._version for one in (gradient, part) if one is not None and not one.is_inference())
