"""Weights and gradients that are finite, but not in the dtype to which FSDP2 casts them under a policy of mixed precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.forensics.casts import sharded_modules
from gradwatch.forensics.frames import Place
from gradwatch.forensics.marks import Mark
from gradwatch.forensics.operands import is_nonfinite, operand_of
from gradwatch.measure.wrappers import is_dtensor, plain_name
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from gradwatch.records import Operand

_MOST = 4  # gradients whose numbers are kept


class _Weight(NamedTuple):
    """One weight that FSDP2 gathers.

    Attributes:
        known: what FSDP2 knows of it.
        path: path of its module.
        name: its name in the model.
        now: what its module holds: itself, or its stand-in.
    """

    known: Any
    path: str
    name: str
    now: Any


def _weights(model: nn.Module) -> Iterator[_Weight]:
    paths = {id(one): plain_name(path) for path, one in model.named_modules()}
    # modules that were given to `fully_shard` together have one state
    states = dict.fromkeys(one._get_fsdp_state() for one in sharded_modules(model))
    for group in (group for state in states for group in getattr(state, "_fsdp_param_groups", ())):
        for known in group.fsdp_params:
            module, name = known._module_info.module, known._module_info.param_name
            path = paths.get(id(module), "")
            yield _Weight(known, path, f"{path}.{name}" if path else name, module._parameters[name])


@torch.no_grad()
def overflowed_weights(model: nn.Module) -> list[tuple[Tensor, Mark]]:
    """Return the gathered weights that were finite before they were cast, with what made them infinite.

    All processes call this at once, and gather such weights again as they are.
    """
    found: list[tuple[Tensor, str, Operand, Operand]] = []
    for known, path, name, gathered in _weights(model):
        part = known._sharded_local_tensor
        if is_dtensor(gathered) or type(part) is not torch.Tensor:
            continue  # a weight of another kind
        if known.param_dtype is not None and is_nonfinite(gathered):
            part = part.to(known.device)  # it may lie in the memory of the host
            whole = known.to_sharded_dtensor(part).full_tensor()
            if not is_nonfinite(whole):
                found.append((gathered, path, operand_of(name, whole), operand_of("output", gathered)))
    first = -len(found)  # they were cast before every operation
    return [
        (gathered, _cast(first + place, path, (before,), after))
        for place, (gathered, path, before, after) in enumerate(found)
    ]


@torch.no_grad()
def overflowed_gradients(model: nn.Module) -> Mark | None:
    """Return the mark of gradients that FSDP2 casts for their reduction beyond the range of that dtype; None if there are none.

    They are those of the stand-ins that the modules hold.
    """
    found: list[tuple[str, Operand, Operand]] = []
    for known, path, name, weight in _weights(model):
        gradient, dtype = weight.grad, known.reduce_dtype
        if gradient is None or dtype is None or torch.finfo(dtype).max >= torch.finfo(gradient.dtype).max:
            continue
        if is_nonfinite(gradient):
            continue
        reduced = gradient.to(dtype)
        if is_nonfinite(reduced):
            found.append((path, operand_of(f"gradient of {name}", gradient), operand_of("output", reduced)))
    if not found:
        return None
    found.sort(key=lambda one: -_size(one[1]))
    paths, inputs, outputs = zip(*found, strict=True)
    dtype = outputs[0].dtype
    mark = _cast(0, paths[0] if len(set(paths)) == 1 else "", inputs[:_MOST], outputs[0])
    told = f"got gradients up to {number(_size(inputs[0]))}, which FSDP2 reduces in {dtype},"
    return replace(mark, backward=True, scalars={"got": told, "reduced": dtype})


def _cast(order: int, path: str, inputs: tuple[Operand, ...], output: Operand) -> Mark:
    return Mark(order, "operation", "to_copy", "to_copy", place=Place(module=path), inputs=inputs, output=output)


def _size(operand: Operand) -> float:
    return max(abs(operand.smallest), abs(operand.largest))
