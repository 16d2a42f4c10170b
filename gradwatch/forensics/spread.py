"""Repeating a forward whose weights FSDP2 has spread over processes: all of them run it together, on the weights themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator as AnIterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.standins import CannotRepeatError, copied_state
from gradwatch.measure.deepspeed import engine_of
from gradwatch.measure.wrappers import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from gradwatch.forensics.capture import Call


def is_spread(model: nn.Module) -> bool:
    """Return whether the weights are spread over processes, so that a forward is one of all of them together.

    Under DeepSpeed it counts as one at every stage, since its hooks on modules act on other processes.
    """
    return any(is_dtensor(one) for one in model.parameters()) or engine_of(model) is not None


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which `fully_shard` was applied."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [one for one in model.modules() if kind is not None and isinstance(one, kind)]


def can_repeat_together(model: nn.Module, call: Call) -> bool:
    """Return whether this process can repeat a forward together with the others.

    What FSDP2 gathers is not known by the memory of weights, so that a damaged weight would not be recognised.
    """
    sharded = sharded_modules(model)
    inside = {id(parameter) for one in sharded for parameter in one.parameters()}
    if any(is_dtensor(one) and id(one) not in inside for one in model.parameters()):
        return False  # of tensor parallelism
    if call.changed or any(isinstance(one, AnIterator) for one in (*call.args, *call.kwargs.values())):
        return False
    return bool(sharded) and not any(map(is_nonfinite, model.parameters()))


@contextmanager
def gathered(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let a model run on its own weights, which FSDP2 gathers, and put back everything else that its modules hold."""
    sharded = sharded_modules(model)
    if not sharded:
        raise CannotRepeatError("its weights are spread over processes")
    with copied_state(model):
        try:
            yield []
        finally:
            for one in sharded:
                one.reshard()
