"""Computing a loss again while each operation is watched: from its source, or on request by running its statements.

The source is evaluated in a copy of the caller's names, with the output that the model gave in place of the call. What comes of
it counts only if the loss and its graph are those of the original.
"""

from __future__ import annotations

import ast
import sys
import warnings
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics import rerun
from gradwatch.forensics.call import outputs_in
from gradwatch.forensics.evaluate import Evaluator
from gradwatch.forensics.frames import line_of, locals_of
from gradwatch.forensics.from_source import NO_CALL, NotCalledError, evaluated, resumed
from gradwatch.forensics.multiples import multiples_of
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.outputs import detached
from gradwatch.forensics.same_graph import is_same_graph, place_of
from gradwatch.forensics.source import Scope
from gradwatch.forensics.standins import CannotRepeatError, eagerly, generators_kept
from gradwatch.forensics.statements import (
    Backward,
    arguments_on,
    check_names,
    reaching_back,
    statements_of,
)
from gradwatch.forensics.trace import Trace, marks_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

    from torch import Tensor

    from gradwatch.forensics.callers import Caller
    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.names import Names
    from gradwatch.forensics.same_graph import Place

_CALLERS = 8  # functions around the one that calls backward


class LossAgain:
    """The loss of some forwards, to be computed again.

    Args:
        at: where backward was called, and the forwards.
        names: names of tensors.
        batch: number of rows.
    """

    def __init__(self, at: Backward, names: Names, batch: int) -> None:
        self._at = at
        self._names = names
        self._batch = batch

    def evaluated(self, *, backward: bool) -> tuple[Mark, ...]:
        """Evaluate the source, and return the marks of the loss or, if ``backward``, of the gradient of the output.

        Raises:
            CannotRepeatError: the source is not understood, or gives another loss or another graph.
        """
        failures = []
        if self._at.multiples and (callers := self._at.calls[0].callers):
            try:
                return self._of_ended(callers, backward)
            except CannotRepeatError as error:
                failures.append(error)
        frame = _frame_of(self._at.code)
        if frame is None:
            raise CannotRepeatError("the function that called backward has ended") if not failures else failures[0]
        try:
            return self._from(frame, self._at.line, None, self._at.roots, backward)
        except CannotRepeatError as error:
            failures.append(error)
        if not backward:  # which is running now, so that callers of a function that calls backward still stand at it
            for outer in _callers_of(frame):
                with suppress(CannotRepeatError):
                    for given, value in _losses_given(outer, self._at.roots):
                        return self._from(outer, outer.f_lineno, given, [value], backward)
        raise failures[0]

    def _of_ended(self, callers: tuple[Caller, ...], backward: bool) -> tuple[Mark, ...]:  # noqa: FBT001
        """Evaluate what functions have done that called the model, until one returned what the root is a multiple of."""
        autocast, ends = self._at.calls[0].autocast, self._ends()

        def chosen(found: Any, outputs: list[Tensor]) -> Tensor | None:
            for _, one in outputs_in(found):
                if one.numel() != 1 or not one.requires_grad:
                    continue
                for multiple in self._at.multiples:
                    value, root = multiple.root_of(one), self._at.loss
                    is_loss = value is None or root is None or _is_same(value, root)
                    if is_loss and is_same_graph([multiple.place], [place_of(one)], ends, [*map(place_of, outputs)]):
                        return one
            return None

        return self._marks(partial(resumed, self._at.calls, callers, autocast), chosen, backward)

    def _from(
        self,
        frame: FrameType,
        line: int,
        root: ast.expr | None,
        losses: list[Tensor],
        backward: bool,  # noqa: FBT001
    ) -> tuple[Mark, ...]:
        """Evaluate the last statement before a line, the last two, until they call the model as often as it was called."""
        failure = CannotRepeatError(NO_CALL)
        for source in reaching_back(frame.f_code.co_filename, frame.f_code.co_firstlineno, line, root):
            try:
                check_names([*source.before, ast.Expr(source.root)])
            except CannotRepeatError as error:  # further statements may tell what the name was
                failure = error
                continue
            try:
                compute = partial(evaluated, self._at.calls, Scope.of_frame(frame), source)
                return self._marks(compute, partial(self._same, losses), backward)
            except NotCalledError as error:
                failure = error
        raise failure

    def run(self, *, backward: bool) -> tuple[Mark, ...]:
        """Run the statements, and return the same. This runs code of the user's.

        Raises:
            CannotRepeatError: the statements cannot be told apart, need what is gone, or give another loss.
        """
        frame = _frame_of(self._at.code)
        if len(self._at.calls) != 1:
            raise CannotRepeatError("several forwards belong to the loss")
        (call,) = self._at.calls
        if frame is None or call.code is not self._at.code:
            raise CannotRepeatError("the model and the backward are not called in one function")
        source = statements_of(call.file, call.line, self._at.line)
        names = {**frame.f_globals, **locals_of(frame)}
        return self._marks(partial(rerun.run, call.module, names, source), partial(self._same, []), backward)

    def _same(self, losses: list[Tensor], root: Any, outputs: list[Tensor]) -> Tensor:
        """Return the root if it is the loss."""
        if not isinstance(root, torch.Tensor) or root.numel() != 1:
            raise CannotRepeatError("what is computed again is no loss")
        value = float(losses[0].item()) if len(losses) == 1 and losses[0].numel() == 1 else self._at.loss
        if value is not None and not _is_same(float(root.item()), value):
            raise CannotRepeatError("the statements of the loss give another loss when they are computed again")
        before, after = [*map(place_of, losses)], [*map(place_of, outputs)]
        if losses and not is_same_graph(before, [place_of(root)], self._ends(), after):
            raise CannotRepeatError("the source of the loss gives another graph when it is evaluated")
        return root

    def _ends(self) -> list[Place]:
        """Return where the graph of the loss meets that of the model, also for an output that was multiplied in place since."""
        return [
            next((part.place for part in multiples_of(one) if call.made(part.place[0]._sequence_nr())), place_of(one))
            for call in self._at.calls
            for one in call.outputs
        ]

    def _marks(
        self,
        compute: Callable[[list[Any]], Iterator[Any]],
        chosen: Callable[[Any, list[Tensor]], Tensor | None],
        backward: bool,  # noqa: FBT001
    ) -> tuple[Mark, ...]:
        """Compute values, each from the ones before, until one of them is the loss."""
        given = [detached(call.output) for call in self._at.calls]
        outputs = [one for output in given for _, one in outputs_in(output)]
        self._names.add_outputs(outputs)
        trace = Trace(self._names, LossAgain._marks.__code__, batch=self._batch, alone=True, random=False)
        with ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(eagerly())
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(torch.enable_grad())
            values, root = compute(given), None
            while root is None:
                with trace:
                    found = next(values, values)
                if found is values:
                    raise CannotRepeatError("the functions that called the model give another loss")
                root = chosen(found, outputs)
            inputs = [one for one in outputs if one.requires_grad]
            if backward and inputs:
                run = torch.autograd.graph._engine_run_backward
                options: dict[str, Any] = {"inputs": tuple(inputs), "allow_unreachable": True, "accumulate_grad": True}
                with trace:
                    run((root,), (torch.ones_like(root),), True, False, **options)  # noqa: FBT003  in the order of the engine
        if trace.failed is not None:
            raise trace.failed
        if not backward:
            return marks_in(trace, [root])
        return marks_in(trace, [one.grad for one in inputs if one.grad is not None and is_nonfinite(one.grad)])


def _is_same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)  # noqa: PLR0124


def _frame_of(code: CodeType | None) -> FrameType | None:
    """Return the frame of a function that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _callers_of(frame: FrameType) -> Iterator[FrameType]:
    """Yield the functions of the user that have called one, the innermost first."""
    left = _CALLERS
    outer = line_of(frame.f_back)[2]
    while outer is not None and left:
        yield outer
        left -= 1
        outer = line_of(outer.f_back)[2]


def _losses_given(frame: FrameType, roots: list[Tensor]) -> Iterator[tuple[ast.expr, Tensor]]:
    """Yield what a function gives away on its line that is the loss, or of which the loss is a multiple."""
    code = frame.f_code
    for given in arguments_on(code.co_filename, code.co_firstlineno, frame.f_lineno):
        try:
            value = Evaluator(lambda _: NotImplemented).value(given, Scope.of_frame(frame))
        except CannotRepeatError:
            continue
        if (
            isinstance(value, torch.Tensor)
            and len(roots) == 1
            and value.grad_fn is not None
            and any(one.place[0] is value.grad_fn for one in multiples_of(roots[0]))
        ):
            yield given, value
