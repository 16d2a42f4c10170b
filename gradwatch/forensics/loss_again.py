"""Computing a loss again while each operation is watched: from its source, or on request by running its statements.

The source is evaluated in a copy of the caller's names, with the output that the model gave in place of the call. What comes of
it counts only if the loss and its graph are those of the original.
"""

from __future__ import annotations

import ast
import copy
import sys
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.capture import outputs_in
from gradwatch.forensics.evaluate import Evaluator
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.pure import is_plain
from gradwatch.forensics.same_graph import is_same_graph
from gradwatch.forensics.source import Scope
from gradwatch.forensics.standins import CannotRepeatError, eagerly, generators_kept
from gradwatch.forensics.statements import Backward, Statements, statements_of
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

    from torch import Tensor

    from gradwatch.forensics.capture import Call
    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.names import Names

_OUTPUT, _ROOT = "__gradwatch_output__", "__gradwatch_root__"


class LossAgain:
    """The loss of one forward, to be computed again.

    Args:
        model: the model.
        call: its forward.
        at: where backward was called.
        names: names of tensors.
        batch: number of rows.
    """

    def __init__(self, model: nn.Module, call: Call, at: Backward, names: Names, batch: int) -> None:
        self._model = unwrapped(model)
        self._call = call
        self._at = at
        self._names = names
        self._batch = batch

    def evaluated(self, *, backward: bool) -> tuple[Mark, ...]:
        """Evaluate the source, and return the marks of the loss or, if ``backward``, of the gradient of the output.

        Raises:
            CannotRepeatError: the source is not understood, or gives another loss or another graph.
        """
        return self._marks(
            lambda frame, source, output: _evaluated(self._model, Scope.of_frame(frame), source, output),
            self._at.roots,
            backward,
        )

    def run(self, *, backward: bool) -> tuple[Mark, ...]:
        """Run the statements, and return the same. This runs code of the user's.

        Raises:
            CannotRepeatError: the statements cannot be told apart, need what is gone, or give another loss.
        """

        def compute(frame: FrameType, source: Statements, output: Any) -> Any:
            names = {**frame.f_globals, **frame.f_locals}
            return _run(self._code(names, source), names, output)

        return self._marks(compute, [], backward)

    def _marks(
        self,
        compute: Callable[[FrameType, Statements, Any], Any],
        losses: list[Tensor],
        backward: bool,  # noqa: FBT001
    ) -> tuple[Mark, ...]:
        frame = _frame_of(self._call.code)
        if frame is None or self._call.code is not self._at.code:
            raise CannotRepeatError("the model and the backward are not called in one function")
        source = statements_of(self._call.file, self._call.line, self._at.line)
        output = _detached(self._call.output)
        self._names.add_outputs(one for _, one in outputs_in(output))
        trace = Trace(self._names, LossAgain._marks.__code__, batch=self._batch, alone=True, random=False)
        with ExitStack() as stack:
            stack.enter_context(generators_kept())
            stack.enter_context(eagerly())
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(trace)
            root = compute(frame, source, output)
            if not isinstance(root, torch.Tensor) or root.numel() != 1:
                raise CannotRepeatError("what is computed again is no loss")
            inputs = [one for _, one in outputs_in(output) if one.requires_grad]
            if backward and inputs:
                run = torch.autograd.graph._engine_run_backward
                options: dict[str, Any] = {"inputs": tuple(inputs), "allow_unreachable": True, "accumulate_grad": True}
                run((root,), (torch.ones_like(root),), True, False, **options)  # noqa: FBT003  in the order of the engine
        if self._at.loss is not None and not _is_same(float(root.item()), self._at.loss):
            raise CannotRepeatError("the statements of the loss give another loss when they are computed again")
        if losses and not is_same_graph(losses, [root], self._call.outputs, [one for _, one in outputs_in(output)]):
            raise CannotRepeatError("the source of the loss gives another graph when it is evaluated")
        if trace.failed is not None:
            raise trace.failed
        if not backward:
            return marks_in(trace, [root])
        return marks_in(trace, [one.grad for one in inputs if one.grad is not None and is_nonfinite(one.grad)])

    def _code(self, names: dict[str, Any], source: Statements) -> CodeType:
        """Return the statements with the output in place of the call of the model."""
        source = copy.deepcopy(source)
        assign = ast.Assign([ast.Name(_ROOT, ast.Store())], source.root)
        swap = _Swap(self._model, names)
        body = [swap.visit(one) for one in [*source.before, ast.copy_location(assign, source.last)]]
        if swap.count != 1:
            raise CannotRepeatError("the call of the model is not found among the statements of the loss")
        return compile(ast.fix_missing_locations(ast.Module(body, [])), self._call.file, "exec")


def _evaluated(model: nn.Module, scope: Scope, source: Statements, output: Any) -> Any:
    count = 0

    def called(function: Any) -> Any:
        nonlocal count
        if not isinstance(function, nn.Module) or unwrapped(function) is not model:
            return NotImplemented
        count += 1
        return output

    evaluator = Evaluator(called)
    evaluator.run(source.before, scope)
    root = evaluator.value(source.root, scope)
    if count != 1:
        raise CannotRepeatError("the call of the model is not found among the statements of the loss")
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
