"""Watching each operation: which one makes a non-finite number of finite ones.

A dispatch mode sees every operation of ATen, in forwards and in backwards. It checks what each one returns. An output that is
not finite although all inputs are is an origin; with an input that is not finite, it takes over the marks of that input.
Infinities that were written on purpose, such as those of a mask, are mute: an operation that makes NaN of them is the origin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.forensics import ops
from gradwatch.forensics.frames import Place, place_of
from gradwatch.forensics.marks import Mark, Marked, ordered
from gradwatch.forensics.operands import has_nan, is_nonfinite, nonfinite_in, operand_of, plain, rows_of
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.measure.wrappers import local_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import CodeType

    from torch import Tensor

    from gradwatch.forensics.names import Names
    from gradwatch.records import Subject

    Inputs = list[tuple[str, Tensor]]

_FINITE = 0.7  # what stands for a non-finite element in a trial: no common function is singular there
_MOST = 4  # inputs whose numbers are kept


class Trace(TorchDispatchMode):
    """Watches operations while it is entered.

    Args:
        names: names of modules, weights, buffers and inputs.
        until: function at which the program of the user ends, see `gradwatch.forensics.frames.place_of`.
        repaired: indices of operations whose non-finite outputs are replaced by finite numbers, for a trial.
        batch: number of rows of the batch; 0 if it is not known.
        backward: whether a backward may follow, so that the lines of all forwards have to be remembered.
        alone: whether other processes do not run the same now, so that an exchange with them would never end.
        random: whether operations may draw random numbers, because generators are in the state in which they were.

    Attributes:
        marked: marks of the tensors that are not finite.
        count: number of operations so far.
        failed: first error of the watching itself, after which nothing is watched.
    """

    def __init__(
        self,
        names: Names,
        until: CodeType | None = None,
        repaired: frozenset[int] = frozenset(),
        batch: int = 0,
        *,
        backward: bool = True,
        alone: bool = False,
        random: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.marked = Marked()
        self.batch = batch
        self.count = 0
        self.failed: Exception | None = None
        self._until = until
        self._backward = backward
        self._alone = alone
        self._random = random
        self._updating = False
        self._repaired = repaired
        self._calls: dict[int, tuple[str, Place]] = {}  # number of a node of autograd -> the forward that made it
        self._outside: dict[Any, Mark] = {}
        # copies of what an operation has changed in place -> the tensors themselves
        self._originals: dict[int, Tensor] = {}

    @property
    def repairs(self) -> bool:
        """Whether this is a trial."""
        return bool(self._repaired)

    def of_batch(self, rows: int) -> None:
        """Set the number of rows of the batch."""
        self.batch = rows

    def updates(self, *, on: bool) -> None:
        """Record that an optimizer begins or ends its step."""
        self._updating = on

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch not to load its compiler for this class, which takes seconds; nothing is compiled while it is entered."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        kwargs = kwargs or {}
        before: tuple[Any, Any] | None = None
        changed: Sequence[Tensor] = ()
        try:
            if self.failed is None and not ops.is_view(func) and not ops.is_of_profiler(func):
                changed, before = self._prepare(func, args, kwargs)
        except CannotRepeatError:
            raise
        except Exception as error:  # watching must not change what is watched: copies may find no memory
            self.failed = error
        result = func(*args, **kwargs)
        try:
            if before is not None:
                self._look(func, *before, result, changed)
        except Exception as error:
            self.failed = error
        self._originals = {}
        return result

    def _prepare(self, func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], tuple[Any, Any]]:
        """Return the tensors that an operation is about to change, and its arguments, with copies in place of those tensors.

        Raises:
            CannotRepeatError: the trace is to repeat a step, and the operation cannot be repeated.
        """
        if self._alone and ops.is_collective(func):
            raise CannotRepeatError("it exchanges tensors with other processes, which do not repeat it")
        if not self._random and ops.is_random(func):
            raise CannotRepeatError("it draws random numbers")
        changed = ops.changed_by(func, args, kwargs)
        if not changed:
            return [], (args, kwargs)
        before, self._originals = ops.copied(args, kwargs, changed)
        return changed, before

    def _look(self, func: Any, args: Any, kwargs: Any, result: Any, changed: Sequence[Tensor]) -> None:
        order, self.count = self.count, self.count + 1
        if self._backward:
            self._note_call(func)
        if ops.is_collective(func):  # what it returns may arrive later; marks of other processes are not known here
            given, returned = list(ops.named_inputs(func, args, kwargs)), list(ops.tensors(result))
            bad = [one for _, one in given if is_nonfinite(one) and not any(one is other for other in returned)]
            marks = ordered(mark for one in bad for mark in self.marks_of(one, func, order))
            for one in (*returned, *changed):
                self.marked.put(local_of(one.detach()), marks)
            return
        outputs = [one for one in (*ops.tensors(result), *changed) if is_nonfinite(one)]
        if not outputs:
            return
        if order in self._repaired:
            for one in outputs:
                _repair(one)
            return
        inputs = list(ops.named_inputs(func, args, kwargs))
        marks = self._marks(func, args, kwargs, inputs, outputs, order)
        for one in outputs:
            here = local_of(one.detach())
            kept = self.marked.of(here) if any(one is other for other in changed) else ()
            self.marked.put(here, (*kept, *marks))

    def _note_call(self, func: Any) -> None:
        """Remember the line of a forward, by the number of the node that autograd has just made for it."""
        number = ops.next_node() - 1
        if number not in self._calls and ops.current_node() is None:
            self._calls[number] = ops.name_of(func), place_of(self.names, 2, self._until)
        elif number not in self._calls and not (place := place_of(self.names, 2, self._until)).inside_backward:
            self._calls[number] = ops.name_of(func), place  # recomputed in the backward by a checkpoint

    def _marks(
        self, func: Any, args: Any, kwargs: Any, inputs: Inputs, outputs: list[Tensor], order: int
    ) -> tuple[Mark, ...]:
        bad = [(name, one) for name, one in inputs if is_nonfinite(one)]
        if not bad:
            return (self._new(func, args, kwargs, inputs, outputs[0], order),)
        each = [self._heard_of(one, func, order, name) for name, one in bad]
        each = self._that_count(func, args, kwargs, bad, each, outputs[0])
        inherited = ordered(mark for marks in each for mark in marks)
        # what infinities that were written on purpose become, such as the softmax of a row that is masked altogether
        mute = all(mark.mute for mark in inherited)
        if mute and (any(map(has_nan, outputs)) or ops.name_of(func) == "logsumexp"):
            given = [mark for mark in inherited if mark.subject in ("input", "argument")]
            if given and ops.multiplies(func):  # no mask, for one is only added or chosen by
                return tuple(mark.heard() for mark in given)
            return (self._new(func, args, kwargs, inputs, outputs[0], order),)
        if self._makes(func, args, kwargs, [one for _, one in bad], [one for _, one in inputs]):
            inherited = ordered((*inherited, self._new(func, args, kwargs, inputs, outputs[0], order)))
        return inherited

    def _heard_of(self, tensor: Tensor, func: Any, order: int, name: str) -> tuple[Mark, ...]:
        """Return the marks of an input; infinities of one that is multiplied as it was given are those of no mask."""
        known = self.marked.of(local_of(self._originals.get(id(tensor), tensor).detach()))
        marks = self.marks_of(tensor, func, order, name)
        if known or not ops.multiplies(func):
            return marks
        return tuple(one.heard() if one.subject in ("input", "argument", "buffer") else one for one in marks)

    def marks_of(self, tensor: Tensor, func: Any = None, order: int = -1, name: str = "") -> tuple[Mark, ...]:
        """Return the marks of a tensor that is not finite, also of one that was made before anything was watched.

        Args:
            tensor: the tensor.
            func: operation that got it; None if there is none.
            order: index of the operation.
            name: argument of the operation.
        """
        here = local_of(self._originals.get(id(tensor), tensor).detach())
        found = self.marked.of(here)
        return found or (self._from_outside(here, tensor, func, order, name),)

    def _from_outside(self, itself: Tensor, tensor: Tensor, func: Any, order: int, argument: str) -> Mark:
        known = self.names.of(itself)
        subject: Subject = "argument" if known is None else known.subject
        mute = subject != "weight" and not has_nan(tensor)
        name = known.name if known is not None else argument
        key = id(known.tensor) if known is not None else (order, argument)
        if key not in self._outside:
            place = place_of(self.names, 4, self._until) if func is not None else Place()
            # rows of what was computed are not those that were loaded
            of_batch = self.names.has_no_dimension_of(self.batch) if known is None else subject != "argument"
            rows = rows_of(tensor) if of_batch and len(tensor.shape) and len(tensor) == self.batch else ()
            self._outside[key] = Mark(
                order,
                subject,
                ops.name_of(func) if func is not None else "",
                mute=mute,
                backward=place.inside_backward,
                place=place,
                name=name,
                earlier=known is None and tensor.grad_fn is not None,
                inputs=(operand_of(name or "input", tensor),),
                rows=rows,
                rows_known=bool(rows),
            )
            if known is None and func is not None:
                self.marked.put(itself, (self._outside[key],))  # the first operation that met it
        return self._outside[key]

    def _that_count(
        self, func: Any, args: Any, kwargs: Any, bad: Inputs, each: list[tuple[Mark, ...]], output: Tensor
    ) -> list[tuple[Mark, ...]]:
        """Return the marks of those inputs whose non-finite elements reach the output; `where` may drop some."""
        if len(set(each)) < 2 or not ops.can_repeat(func):
            return each
        whole = nonfinite_in(plain(output))  # type: ignore[arg-type]
        counting = []
        for (_, one), marks in zip(bad, each, strict=True):
            trial = self._first_of(ops.repeated(func, args, kwargs, [one], _FINITE))
            if trial is None or trial.shape != whole.shape or not torch.equal(nonfinite_in(trial), whole):
                counting.append(marks)
        return counting or each

    @staticmethod
    def _first_of(result: Any) -> Tensor | None:
        return next((here for one in ops.tensors(result) if (here := plain(one)) is not None), None)

    @staticmethod
    def _makes(func: Any, args: Any, kwargs: Any, bad: list[Tensor], given: list[Tensor]) -> bool:
        """Return whether an operation makes something non-finite also of the finite elements of its inputs."""
        if not ops.can_repeat(func) or ops.is_writer(func) or ops.only_passes_on(func, args, kwargs, given, bad):
            return False
        return any(map(is_nonfinite, ops.tensors(ops.repeated(func, args, kwargs, bad, _FINITE))))

    def _new(self, func: Any, args: Any, kwargs: Any, inputs: Inputs, output: Tensor, order: int) -> Mark:
        """Return the mark of an operation that has made something non-finite."""
        node, raw = ops.current_node(), ops.name_of(func)
        place, op = place_of(self.names, 4, self._until), raw
        backward = node is not None and place.inside_backward
        if backward and node is not None:
            made_by = self._calls.get(node._sequence_nr())
            if place.own_backward:
                place = place._replace(module=made_by[1].module if made_by is not None else None)
            else:
                op, place = made_by or (ops.forward_of(node.name()), Place())
        writes = ops.is_writer(func)
        here = local_of(output.detach())
        rows = rows_of(here) if self.batch > 1 and here.dim() and len(here) == self.batch else ()
        return Mark(
            order,
            "written" if writes else "operation",
            op,
            raw,
            mute=writes and (ops.is_uninitialised(func) or not has_nan(output)),
            node=node.name() if backward and node is not None else "",
            backward=backward,
            update=self._updating and place.in_optimizer,
            place=place,
            inputs=tuple(operand_of(name, one) for name, one in inputs[:_MOST]),
            output=operand_of("output", here),
            scalars=ops.scalars_of(func, args, kwargs) | ops.signs_of(plain(one) for _, one in inputs),
            rows=rows if len(rows) < self.batch else (),
            rows_known=self.names.has_no_dimension_of(self.batch),
        )


def _repair(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.nan_to_num_(nan=_FINITE, posinf=_FINITE, neginf=_FINITE)


def marks_in(trace: Trace, tensors: Iterable[Tensor]) -> tuple[Mark, ...]:
    """Return the marks of those tensors that are not finite; none of one that no operation has made or met."""
    return ordered(mark for mark in _marks_in(trace, tensors) if mark.op or mark.subject != "argument")


def _marks_in(trace: Trace, tensors: Iterable[Tensor]) -> Iterator[Mark]:
    for one in tensors:
        if is_nonfinite(one):
            yield from trace.marks_of(one)
