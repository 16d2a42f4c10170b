"""Computing a loss again while each operation is watched: from its source, or on request by running its statements.

The source is evaluated in a copy of the caller's names, with the output that the model gave in place of the call. What comes of
it counts only if the loss and its graph are those of the original.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import warnings
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.capture import outputs_in
from gradwatch.forensics.evaluate import Evaluator
from gradwatch.forensics.frames import line_of
from gradwatch.forensics.multiples import multiples_of
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.outputs import detached
from gradwatch.forensics.same_graph import is_same_graph, place_of
from gradwatch.forensics.source import Scope, plain_function
from gradwatch.forensics.standins import CannotRepeatError, eagerly, generators_kept
from gradwatch.forensics.statements import (
    Backward,
    Statements,
    arguments_on,
    check_names,
    reaching_back,
    statements_of,
)
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

    from torch import Tensor

    from gradwatch.forensics.callers import Caller
    from gradwatch.forensics.capture import Call
    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.names import Names
    from gradwatch.forensics.same_graph import Place

_NO_CALL = "the call of the model is not found among the statements of the loss"
_CALLERS = 8  # functions around the one that calls backward
_OUTPUT, _ROOT = "__gradwatch_output__", "__gradwatch_root__"


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

        return self._marks(partial(_resumed, self._at.calls, callers, autocast), chosen, backward)

    def _from(
        self,
        frame: FrameType,
        line: int,
        root: ast.expr | None,
        losses: list[Tensor],
        backward: bool,  # noqa: FBT001
    ) -> tuple[Mark, ...]:
        """Evaluate the last statement before a line, the last two, until they call the model as often as it was called."""
        failure = CannotRepeatError(_NO_CALL)
        for source in reaching_back(frame.f_code.co_filename, frame.f_code.co_firstlineno, line, root):
            try:
                check_names([*source.before, ast.Expr(source.root)])
            except CannotRepeatError as error:  # further statements may tell what the name was
                failure = error
                continue
            try:
                compute = partial(_evaluated, self._at.calls, Scope.of_frame(frame), source)
                return self._marks(compute, partial(self._same, losses), backward)
            except _NotCalledError as error:
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
        names = {**frame.f_globals, **frame.f_locals}
        code = self._code(names, source, call.file)
        return self._marks(lambda outputs: _run(code, names, outputs[0]), partial(self._same, []), backward)

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

    def _code(self, names: dict[str, Any], source: Statements, file: str) -> CodeType:
        """Return the statements with the output in place of the call of the model."""
        source = copy.deepcopy(source)
        assign = ast.Assign([ast.Name(_ROOT, ast.Store())], source.root)
        swap = _Swap(unwrapped(self._at.calls[0].module), names)
        body = [swap.visit(one) for one in [*source.before, ast.copy_location(assign, source.last)]]
        if swap.count != 1:
            raise CannotRepeatError(_NO_CALL)
        return compile(ast.fix_missing_locations(ast.Module(body, [])), file, "exec")


class _NotCalledError(CannotRepeatError):
    """Raised if statements do not call the model as often as it was called."""


class _Outputs:
    """Stands for the calls of a model, or of its parts, each of which gives its output once."""

    def __init__(self, calls: list[Call], outputs: list[Any]) -> None:
        modules = [unwrapped(one.module) for one in calls]
        self._modules = {id(one) for one in modules}
        self.left = list(zip(modules, outputs, strict=True))

    def __call__(self, function: Any) -> Any:
        module = unwrapped(function) if isinstance(function, nn.Module) else None
        if module is None or id(module) not in self._modules:
            return NotImplemented
        place = next((number for number, (one, _) in enumerate(self.left) if one is module), None)
        if place is None:
            raise CannotRepeatError("the statements of the loss call the model more often than the program has")
        return self.left.pop(place)[1]


def _evaluated(calls: list[Call], scope: Scope, source: Statements, outputs: list[Any]) -> Iterator[Any]:
    called = _Outputs(calls, outputs)
    evaluator = Evaluator(called)
    evaluator.run(source.before, scope)
    root = evaluator.value(source.root, scope)
    if called.left:
        raise _NotCalledError(_NO_CALL)
    yield root


def _resumed(calls: list[Call], callers: tuple[Caller, ...], autocast: Any, outputs: list[Any]) -> Iterator[Any]:
    """Yield what each of the functions returns that called the model, the innermost first."""
    called = _Outputs(calls, outputs)
    with ExitStack() as around:
        if autocast is not None:
            on, dtype, cache = autocast
            around.enter_context(torch.autocast("cpu", dtype=dtype, enabled=on, cache_enabled=cache))
        value, inner = None, None
        for caller in callers:
            once = _Once(inner, value, called)
            value = Evaluator(once, around).resume(caller.code, caller.line, caller.scope())
            if not once.used:
                raise CannotRepeatError(_NO_CALL)
            if not called.left:
                yield value
            inner = caller.code


class _Once:
    """Stands for the call of a function that has returned a value, or for the first of the model, and for later ones of it."""

    def __init__(self, code: CodeType | None, value: Any, called: _Outputs) -> None:
        self._code = code
        self._value = value
        self._called = called
        self.used = False

    def __call__(self, function: Any) -> Any:
        if self._code is not None and not self.used and _runs(function, self._code):
            self.used = True
            return self._value
        given = self._called(function)
        self.used = self.used or (self._code is None and given is not NotImplemented)
        return given


def _runs(function: Any, code: CodeType) -> bool:
    """Return whether calling a function runs code, itself or as what it wraps."""
    if isinstance(function, nn.Module):
        function = inspect.getattr_static(function, "forward", None)
    while function is not None:
        function = plain_function(function)
        if getattr(function, "__code__", None) is code:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _run(code: CodeType, names: dict[str, Any], output: Any) -> Iterator[Any]:
    names[_OUTPUT] = lambda: output
    exec(code, names)  # noqa: S102  the user has asked for it
    yield names[_ROOT]


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


class _Swap(ast.NodeTransformer):
    """Puts the output in place of the call of the model."""

    def __init__(self, model: nn.Module, space: dict[str, Any]) -> None:
        self._model = unwrapped(model)
        self._space = space
        self.count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a call if it is that of the model."""
        self.generic_visit(node)
        if not self._is_model(node.func):
            return node
        self.count += 1
        return ast.copy_location(ast.Call(ast.Name(_OUTPUT, ast.Load()), [], []), node)

    def _is_model(self, function: ast.expr) -> bool:
        parts: list[str] = []
        while isinstance(function, ast.Attribute):
            parts.append(function.attr)
            function = function.value
        if not isinstance(function, ast.Name) or function.id not in self._space:
            return False
        value = self._space[function.id]
        for part in reversed(parts):
            value = getattr(value, part, None)
        return isinstance(value, nn.Module) and unwrapped(value) is self._model
