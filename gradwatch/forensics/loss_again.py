"""Computing a loss again while each operation is watched: from its source, or on request by running its statements.

The source is evaluated in a copy of the caller's names, with the output that the model gave in place of the call. What comes of
it counts only if the loss and its graph are those of the original.
"""

from __future__ import annotations

import ast
import copy
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
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.pure import is_plain
from gradwatch.forensics.same_graph import is_same_graph
from gradwatch.forensics.source import Scope
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

    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.names import Names

_NO_CALL = "the call of the model is not found among the statements of the loss"
_CALLERS = 8  # functions around the one that calls backward
_MULTIPLES = frozenset(("MulBackward0", "DivBackward0", "ToCopyBackward0", "AliasBackward0"))
_OUTPUT, _ROOT = "__gradwatch_output__", "__gradwatch_root__"


class LossAgain:
    """The loss of some forwards, to be computed again.

    Args:
        model: the model.
        at: where backward was called, and the forwards.
        names: names of tensors.
        batch: number of rows.
    """

    def __init__(self, model: nn.Module, at: Backward, names: Names, batch: int) -> None:
        self._model = unwrapped(model)
        self._at = at
        self._names = names
        self._batch = batch

    def evaluated(self, *, backward: bool) -> tuple[Mark, ...]:
        """Evaluate the source, and return the marks of the loss or, if ``backward``, of the gradient of the output.

        Raises:
            CannotRepeatError: the source is not understood, or gives another loss or another graph.
        """
        frame = _frame_of(self._at.code)
        if frame is None:
            raise CannotRepeatError("the function that called backward has ended")
        try:
            return self._from(frame, self._at.line, None, self._at.roots, backward)
        except CannotRepeatError as error:
            failure = error
        if not backward:  # which is running now, so that callers of a function that calls backward still stand at it
            for outer in _callers_of(frame):
                with suppress(CannotRepeatError):
                    for given, value in _losses_given(outer, self._at.roots):
                        return self._from(outer, outer.f_lineno, given, [value], backward)
        raise failure

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
                compute = partial(_evaluated, self._model, Scope.of_frame(frame), source)
                return self._marks(compute, losses, backward)
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
        return self._marks(lambda outputs: _run(self._code(names, source, call.file), names, outputs[0]), [], backward)

    def _marks(
        self,
        compute: Callable[[list[Any]], Any],
        losses: list[Tensor],
        backward: bool,  # noqa: FBT001
    ) -> tuple[Mark, ...]:
        given = [_detached(call.output) for call in self._at.calls]
        outputs = [one for output in given for _, one in outputs_in(output)]
        self._names.add_outputs(outputs)
        trace = Trace(self._names, LossAgain._marks.__code__, batch=self._batch, alone=True, random=False)
        with ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(eagerly())
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(trace)
            root = compute(given)
            if not isinstance(root, torch.Tensor) or root.numel() != 1:
                raise CannotRepeatError("what is computed again is no loss")
            inputs = [one for one in outputs if one.requires_grad]
            if backward and inputs:
                run = torch.autograd.graph._engine_run_backward
                options: dict[str, Any] = {"inputs": tuple(inputs), "allow_unreachable": True, "accumulate_grad": True}
                run((root,), (torch.ones_like(root),), True, False, **options)  # noqa: FBT003  in the order of the engine
        value = float(losses[0].item()) if len(losses) == 1 and losses[0].numel() == 1 else self._at.loss
        if value is not None and not _is_same(float(root.item()), value):
            raise CannotRepeatError("the statements of the loss give another loss when they are computed again")
        ends = [one for call in self._at.calls for one in call.outputs]
        if losses and not is_same_graph(losses, [root], ends, outputs):
            raise CannotRepeatError("the source of the loss gives another graph when it is evaluated")
        if trace.failed is not None:
            raise trace.failed
        if not backward:
            return marks_in(trace, [root])
        return marks_in(trace, [one.grad for one in inputs if one.grad is not None and is_nonfinite(one.grad)])

    def _code(self, names: dict[str, Any], source: Statements, file: str) -> CodeType:
        """Return the statements with the output in place of the call of the model."""
        source = copy.deepcopy(source)
        assign = ast.Assign([ast.Name(_ROOT, ast.Store())], source.root)
        swap = _Swap(self._model, names)
        body = [swap.visit(one) for one in [*source.before, ast.copy_location(assign, source.last)]]
        if swap.count != 1:
            raise CannotRepeatError(_NO_CALL)
        return compile(ast.fix_missing_locations(ast.Module(body, [])), file, "exec")


class _NotCalledError(CannotRepeatError):
    """Raised if statements do not call the model as often as it was called."""


def _evaluated(model: nn.Module, scope: Scope, source: Statements, outputs: list[Any]) -> Any:
    left = list(outputs)

    def called(function: Any) -> Any:
        if not isinstance(function, nn.Module) or unwrapped(function) is not model:
            return NotImplemented
        if not left:
            raise CannotRepeatError("the statements of the loss call the model more often than the program has")
        return left.pop(0)

    evaluator = Evaluator(called)
    evaluator.run(source.before, scope)
    root = evaluator.value(source.root, scope)
    if left:
        raise _NotCalledError(_NO_CALL)
    return root


def _run(code: CodeType, names: dict[str, Any], output: Any) -> Any:
    names[_OUTPUT] = lambda: output
    exec(code, names)  # noqa: S102  the user has asked for it
    return names[_ROOT]


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
        if isinstance(value, torch.Tensor) and len(roots) == 1 and _is_multiple(roots[0], value):
            yield given, value


def _is_multiple(tensor: Tensor, of: Tensor) -> bool:
    """Return whether a tensor is another one, multiplied or divided by what needs no gradient."""
    node, left = tensor.grad_fn, _CALLERS
    while node is not None and of.grad_fn is not None and left:
        if node is of.grad_fn:
            return True
        ahead = [one for one, _ in node.next_functions if one is not None]
        node = ahead[0] if len(ahead) == 1 and node.name() in _MULTIPLES else None
        left -= 1
    return False


def _detached(output: Any) -> Any:
    """Return the output of a model, apart from its graph, whose own saved tensors are still needed."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone().requires_grad_(output.requires_grad)
    if type(output) in (list, tuple):
        return type(output)(_detached(one) for one in output)
    if type(output) is dict:
        return {key: _detached(one) for key, one in output.items()}
    if is_plain(output):
        return output
    raise CannotRepeatError("the output of the model is no tensor, list, tuple or dict")


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
