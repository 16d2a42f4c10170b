"""Repeating a forward, and if asked for its backward, while each operation is watched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator as AnIterator
from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.forensics.call import Call, outputs_in
from gradwatch.forensics.casts import casts
from gradwatch.forensics.marks import Mark, ordered
from gradwatch.forensics.names import Names, inputs_of, tensors_in
from gradwatch.forensics.narrowed import overflowed_gradients
from gradwatch.forensics.reached import FirstGradient, ReachedError, RowsAt
from gradwatch.forensics.spread import gathered
from gradwatch.forensics.standins import CannotRepeatError, eagerly, generators_kept, stand_ins
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.utils._python_dispatch import TorchDispatchMode

    Gradients = list[Tensor | None]

_TRIALS = 4  # candidates among which a decision is tried


class Replay(NamedTuple):
    """What came of a forward that was run again.

    Attributes:
        outputs: tensors that the model returned.
        marks: marks of those that are not finite or, with a backward, of the gradients that are not.
        ops: number of operations that were watched.
        reduced: mark of finite gradients that FSDP2 reduces in a dtype in which they are not; None if all are.
    """

    outputs: list[Tensor]
    marks: tuple[Mark, ...]
    ops: int
    reduced: Mark | None = None


class Repeat:
    """A forward of a model that can be run again.

    Args:
        model: the model.
        call: the forward.
        gradients: gradients that had reached the outputs; None: no backward.
        together: whether all processes repeat it at once, because each has a part of the weights.
        overflowed: weights that were finite before FSDP2 has cast them, with what made them infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        gradients: Gradients | None = None,
        *,
        together: bool = False,
        overflowed: Sequence[tuple[Tensor, Mark]] = (),
    ) -> None:
        self._together = together
        self._overflowed = overflowed
        self._reduced: Mark | None = None
        self.model = unwrapped(model)
        self._module = unwrapped(call.module)
        self.call = call
        self.gradients = gradients
        self.batch = batch_of(call.args, call.kwargs)
        if any(isinstance(one, AnIterator) for one in (*call.args, *call.kwargs.values())):
            raise CannotRepeatError("its input is an iterator, which can be read only once")

    def run(self, repaired: frozenset[int] = frozenset()) -> Replay:
        """Run it.

        Args:
            repaired: indices of operations whose non-finite outputs are replaced, see `Trace`.
        """
        trace = Trace(
            Names(self.model),
            _called.__code__,
            repaired,
            self.batch,
            backward=self.gradients is not None,
            alone=not self._together,
        )
        outputs, gradients, first = self._play(trace, trace.names)
        if trace.failed is not None:
            raise trace.failed
        marks = first or marks_in(trace, gradients if self.gradients is not None else outputs)
        return Replay(outputs, marks, trace.count, self._reduced)

    def rows_at(self, order: int, shift: int) -> tuple[int, ...]:
        """Return the rows of the batch at which the output of one operation is not finite, and run no further.

        Args:
            order: index of the operation.
            shift: number of places by which the rows of the batch are moved.
        """
        until = RowsAt(order)
        with suppress(ReachedError):
            self._play(until, None, shift)
        return until.rows

    def _play(
        self, mode: TorchDispatchMode, names: Names | None, shift: int = 0
    ) -> tuple[list[Tensor], list[Tensor], tuple[Mark, ...]]:
        """Run it in a mode; return the outputs, gradients of weights and inputs, and the marks at which the backward ended."""
        first: tuple[Mark, ...] = ()
        args, kwargs = self._inputs((self.call.args, self.call.kwargs), shift)
        with ExitStack() as stack:
            weights = stack.enter_context((gathered if self._together else stand_ins)(self.model))
            if names is not None:
                given = inputs_of(self._module, self.call.args, self.call.kwargs)
                names.add_inputs(self._module, args, kwargs, {name for name, one in given if one.grad_fn is not None})
                names.add_state(self.model)
            stack.enter_context(generators_kept(self.call.generator))
            stack.enter_context(eagerly())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # the original has given them
            stack.enter_context(torch.set_grad_enabled(self.gradients is not None))
            if self.call.autocast is not None:
                on, dtype, cache = self.call.autocast
                stack.enter_context(torch.autocast("cpu", dtype=dtype, enabled=on, cache_enabled=cache))
            if isinstance(mode, Trace):
                for weight, mark in self._overflowed:
                    mode.marked.put(weight, (mark,))
            with mode:
                output = _called(self._module, args, kwargs)
                outputs = [one for _, one in outputs_in(output)]
                if self.gradients is not None:
                    until = FirstGradient(mode, weights) if isinstance(mode, Trace) and not mode.repairs else None
                    with suppress(ReachedError) if until is not None else nullcontext():
                        self._backward(outputs, self._shifted(shift))
                    first = until.marks if until is not None else ()
            if self.gradients is not None and names is not None and not first:
                self._reduced = overflowed_gradients(self.model)
        inputs = [one for _, one in tensors_in([args, kwargs])]
        return outputs, [one.grad for one in (*weights, *inputs) if one.is_leaf and one.grad is not None], first

    def _inputs(self, value: Any, shift: int) -> Any:
        """Return copies of the inputs, so that the model may change them in place."""
        if type(value) is torch.Tensor:
            copy = value.detach().clone()
            if shift and copy.dim() and len(copy) == self.batch:
                copy = torch.roll(copy, shift, 0)
            return copy.requires_grad_(value.requires_grad and self.gradients is not None)
        if type(value) is dict:
            return {key: self._inputs(one, shift) for key, one in value.items()}
        return type(value)(self._inputs(one, shift) for one in value) if type(value) in (list, tuple) else value

    def _shifted(self, shift: int) -> Gradients:
        assert self.gradients is not None
        return [
            torch.roll(one, shift, 0) if one is not None and shift and one.dim() and len(one) == self.batch else one
            for one in self.gradients
        ]

    @staticmethod
    def _backward(outputs: list[Tensor], gradients: Gradients) -> None:
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            roots, given = zip(*pairs, strict=True)
            run = torch.autograd.graph._engine_run_backward
            run(roots, given, *(False, False, ()), allow_unreachable=True, accumulate_grad=True)  # on the stand-ins


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def batch_of(args: Any, kwargs: Any) -> int:
    """Return the number of rows of the batch: the length of the first tensor among the inputs; 0 if there is none."""
    for _, one in tensors_in([args, kwargs]):
        if one.dim():
            return len(one)
    return 0


def first_cause(repeat: Repeat, found: Replay) -> Mark | None:
    """Return the first origin that reaches the result by itself; None if that cannot be decided.

    If the result has several, each is tried: with the outputs of the others replaced by finite numbers, the result must still
    not be finite.
    """
    marks = [mark for mark in found.marks if not mark.mute]
    if len({mark.key for mark in marks}) <= 1:
        return marks[0] if marks else None
    made = [mark for mark in marks if mark.subject in ("operation", "written")]
    outside = [mark for mark in marks if mark not in made]
    if all(mark.subject in ("weight", "buffer") for mark in marks):
        return marks[0]
    for mark in ordered(marks)[:_TRIALS]:
        if mark in outside and len(outside) > 1:
            return None
        if mark not in outside and outside:
            continue
        others = frozenset(one.order for one in made if one is not mark)
        if any(one.order == mark.order for one in repeat.run(repaired=others).marks):
            return mark
    return None


def know_rows(repeat: Repeat, mark: Mark) -> None:
    """Make sure that the rows of a mark are those of the batch: with the batch moved by one row, they must move too."""
    if not mark.rows or mark.rows_known:
        return
    expected = tuple(sorted((row + 1) % repeat.batch for row in mark.rows))
    mark.rows_known = repeat.rows_at(mark.order, shift=1) == expected


def is_faithful(call: Call, outputs: list[Tensor]) -> bool | None:
    """Return whether the outputs are those of the original forward; None if these are gone.

    They are compared to the bit where FSDP2 casts, since it is cast again here without its hooks.
    """
    if call.changed:
        return False
    before = [one for _, one in outputs_in(call.output)] if call.output is not None else []
    if not before:
        return None
    rtol, atol = (0.0, 0.0) if casts(unwrapped(call.module)) else (1e-3, 1e-5)
    return len(before) == len(outputs) and all(_alike(*pair, rtol, atol) for pair in zip(before, outputs, strict=True))


def _alike(one: Tensor, other: Tensor, rtol: float, atol: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one.detach(), other.detach(), rtol=rtol, atol=atol, equal_nan=True)
