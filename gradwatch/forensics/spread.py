"""Repeating a step whose weights FSDP2 has spread over processes.

If they fit, all processes gather them at once, and then each repeats its own step on stand-ins of them, which reduces nothing.
Otherwise all of them run a forward together, on the weights themselves, and no backward.
"""

from __future__ import annotations

from collections.abc import Iterator as AnIterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradwatch.forensics.casts import can_cast_again, sharded_modules
from gradwatch.forensics.narrowed import overflowed_weights
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.standins import CannotRepeatError, copied_state
from gradwatch.measure.deepspeed import engine_of
from gradwatch.measure.wrappers import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.marks import Mark

_LARGEST = 2 * 2**30  # bytes of weights that each process holds whole for an investigation


def is_spread(model: nn.Module) -> bool:
    """Return whether the weights are spread over processes, so that a forward is one of all of them together.

    Under DeepSpeed it counts as one at every stage, since its hooks on modules act on other processes. Under FSDP2, weights may
    be whole for now, as those of the outermost module are between a forward and its backward.
    """
    return (
        any(is_dtensor(one) for one in model.parameters())
        or bool(sharded_modules(model))
        or engine_of(model) is not None
    )


def can_repeat_together(model: nn.Module, calls: Sequence[Call]) -> bool:
    """Return whether this process can repeat its forwards together with the others.

    What FSDP2 gathers in a forward is not known by the memory of weights, so that a damaged weight would not be recognised.
    """
    sharded = sharded_modules(model)
    inside = {id(parameter) for one in sharded for parameter in one.parameters()}
    if any(is_dtensor(one) and id(one) not in inside for one in model.parameters()):
        return False  # of tensor parallelism
    given = [one for call in calls for one in (*call.args, *call.kwargs.values())]
    if (
        not sharded
        or not calls
        or any(call.changed for call in calls)
        or any(isinstance(one, AnIterator) for one in given)
    ):
        return False
    return fit_whole(model) or (len(calls) == 1 and not any(map(is_nonfinite, model.parameters())))


def fit_whole(model: nn.Module) -> bool:
    """Return whether all weights can be held whole by each process, as they were in the step. It is the same in all of them."""
    size = sum(one.numel() * one.element_size() for one in model.parameters())  # of a DTensor, those of the whole
    return size <= _LARGEST and can_cast_again(model)


@contextmanager
def whole(model: nn.Module) -> Iterator[list[tuple[Tensor, Mark]]]:
    """Let each process hold all weights; yields those that were cast beyond the range of their dtype, with their marks.

    All processes enter this together; afterwards none waits for another.
    """
    sharded = sharded_modules(model)
    try:
        for one in sharded:
            one.unshard()
        yield overflowed_weights(model)
    finally:
        for one in sharded:
            one.reshard()


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
