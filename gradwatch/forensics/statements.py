"""Running the statements between the call of a model and its backward again, for the line in the code of a loss.

This runs code of the user's once more, so it is only done on request (`forensics="lines"`). Only those statements are run on
which the loss depends, in a copy of the caller's names, with the output that the model gave in place of the call.
"""

from __future__ import annotations

import ast
import linecache
import sys
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gradwatch.forensics.capture import outputs_in
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.standins import CannotRepeatError, eagerly, generators_kept
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from gradwatch.forensics.capture import Call
    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.names import Names

_OUTPUT, _ROOT = "__gradwatch_output__", "__gradwatch_root__"
_LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.Try, ast.FunctionDef, ast.ClassDef)


class Backward(NamedTuple):
    """Where a program has called backward.

    Attributes:
        code, line: function and line.
        loss: value of the loss; None if it is not known.
    """

    code: CodeType
    line: int
    loss: float | None


def again(model: nn.Module, call: Call, at: Backward, names: Names, batch: int, *, backward: bool) -> tuple[Mark, ...]:
    """Run the statements of a loss again and return the marks of the loss or, if ``backward``, of the gradient of the output.

    Raises:
        CannotRepeatError: the statements cannot be told apart, need what is gone, or give another loss.
    """
    frame = _frame_of(call.code)
    if frame is None or call.code is not at.code:
        raise CannotRepeatError("the model and the backward are not called in one function")
    space = {**frame.f_globals, **frame.f_locals}
    code = _code(model, call, at, space)
    output = _detached(call.output)
    space[_OUTPUT] = lambda: output
    trace = Trace(names, _run.__code__, batch=batch, alone=True)
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        stack.enter_context(eagerly())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(trace)
        root = _run(code, space)
        if not isinstance(root, torch.Tensor) or root.numel() != 1:
            raise CannotRepeatError("what is run again gives no loss")
        if backward:
            gradient = torch.ones_like(root)
            torch.autograd.graph._engine_run_backward(
                (root,), (gradient,), *(False, False, ()), allow_unreachable=True, accumulate_grad=True
            )
    if at.loss is not None and not _is_same(float(root.item()), at.loss):
        raise CannotRepeatError("the statements of the loss give another loss when they are run again")
    if trace.failed is not None:
        raise trace.failed
    if not backward:
        return marks_in(trace, [root])
    return marks_in(
        trace, [one.grad for _, one in outputs_in(output) if one.grad is not None and is_nonfinite(one.grad)]
    )


def _run(code: CodeType, space: dict[str, Any]) -> Any:
    exec(code, space)  # noqa: S102  the user has asked for it
    return space[_ROOT]


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
    raise CannotRepeatError("the output of the model is no tensor, list, tuple or dict")


# The statements.


def _code(model: nn.Module, call: Call, at: Backward, space: dict[str, Any]) -> CodeType:
    source = "".join(linecache.getlines(call.file))
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise CannotRepeatError("the source of the program is not at hand") from error
    block, first, last = _block(tree, call.line, at.line)
    root = _root_of(block[last], at.line)
    statements = [] if first == last else _slice(block[first:last], root)
    assign = ast.Assign([ast.Name(_ROOT, ast.Store())], root)
    swap = _Swap(model, space)
    body = [swap.visit(one) for one in [*statements, ast.copy_location(assign, block[last])]]
    if swap.count != 1:
        raise CannotRepeatError("the call of the model is not found among the statements of the loss")
    if any(isinstance(one, _LOOPS) for statement in statements for one in ast.walk(statement)):
        raise CannotRepeatError("the statements of the loss contain a loop")
    _check_names(body)
    module = ast.fix_missing_locations(ast.Module(body, []))
    return compile(module, call.file, "exec")


def _block(tree: ast.AST, call: int, backward: int) -> tuple[list[Any], int, int]:
    """Return the innermost list of statements with both lines, and the indices of the two statements in it."""
    found: tuple[list[Any], int, int] | None = None
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list):
                continue
            first = [index for index, one in enumerate(block) if one.lineno <= call <= (one.end_lineno or 0)]
            last = [index for index, one in enumerate(block) if one.lineno <= backward <= (one.end_lineno or 0)]
            if first and last and first[0] <= last[0]:
                found = block, first[0], last[0]  # inner blocks are walked later
    if found is None:
        raise CannotRepeatError("the call of the model and the backward are not in one block of statements")
    return found


def _root_of(statement: ast.AST, line: int) -> ast.expr:
    """Return the expression of which a statement calls backward."""
    calls = [one for one in ast.walk(statement) if isinstance(one, ast.Call)]
    for node in calls:
        here = isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
        if here and isinstance(node.func, ast.Attribute) and node.lineno <= line <= (node.end_lineno or 0):
            target = node.args[0] if node.args else node.func.value
            scaled = (
                isinstance(target, ast.Call) and isinstance(target.func, ast.Attribute) and target.func.attr == "scale"
            )
            return target.args[0] if scaled and isinstance(target, ast.Call) else target
    raise CannotRepeatError("the statement that calls backward is not understood")


def _slice(statements: list[ast.stmt], root: ast.expr) -> list[ast.stmt]:
    """Return the statements on which an expression depends."""
    needed = _names(root, ast.Load)
    kept: list[ast.stmt] = []
    for one in reversed(statements):
        stored = _names(one, ast.Store)
        if isinstance(one, ast.Expr):  # such as losses.append(loss)
            value = one.value
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                stored = (
                    _names(value.func.value, ast.Load) if value.func.attr in ("append", "extend", "update") else set()
                )
        if isinstance(one, (ast.Assign, ast.AugAssign)):
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            stored |= {
                name for target in targets if isinstance(target, ast.Subscript) for name in _names(target, ast.Load)
            }
        if stored & needed:
            kept.append(one)
            needed |= _names(one, ast.Load)
    return kept[::-1]


def _names(node: ast.AST, kind: type[ast.expr_context]) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, kind)}


def _check_names(body: list[ast.stmt]) -> None:
    """Refuse statements that read a name which they change later: it has changed already."""
    stored = set().union(*(_names(one, ast.Store) for one in body))
    known: set[str] = set()
    for one in body:
        early = _names(one, ast.Load) & stored - known
        if isinstance(one, ast.AugAssign):
            early |= _names(one.target, ast.Store) - known
        if early and not isinstance(one, (ast.With, ast.If)):
            raise CannotRepeatError(f"`{min(early)}` has changed since the loss was computed")
        known |= _names(one, ast.Store)


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


def backward_at(frame: FrameType | None, losses: list[Any]) -> Backward | None:
    """Return where the program calls backward, given its frame."""
    if frame is None:
        return None
    value = losses[0] if len(losses) == 1 and isinstance(losses[0], float) else None
    return Backward(frame.f_code, frame.f_lineno, value)
