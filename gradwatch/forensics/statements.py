"""The statements between the call of a model and its backward on which the loss depends, found in the source of the program."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.forensics.source import tree_of
from gradwatch.forensics.standins import CannotRepeatError

if TYPE_CHECKING:
    from types import CodeType, FrameType
    from typing import Any

    from torch import Tensor

_LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.Try, ast.FunctionDef, ast.ClassDef)


class Backward(NamedTuple):
    """Where a program has called backward.

    Attributes:
        code, line: function and line.
        loss: value of the loss; None if it is not known.
        roots: tensors from which it starts.
    """

    code: CodeType
    line: int
    loss: float | None
    roots: list[Tensor]


class Statements(NamedTuple):
    """The source of a loss.

    Attributes:
        file: file of the program.
        before: the statements on which it depends.
        root: the expression of which backward is called.
        last: the statement that does so.
    """

    file: str
    before: list[ast.stmt]
    root: ast.expr
    last: ast.stmt


def statements_of(file: str, call: int, backward: int) -> Statements:
    """Return the statements of a loss.

    Args:
        file: file of the program.
        call: line on which the model is called.
        backward: line on which backward is called.

    Raises:
        CannotRepeatError: they are not understood.
    """
    tree = tree_of(file)
    if tree is None:
        raise CannotRepeatError("the source of the program is not at hand")
    block, first, last = _block(tree, call, backward)
    root = _root_of(block[last], backward)
    before = [] if first == last else _slice(block[first:last], root)
    if any(isinstance(one, _LOOPS) for statement in before for one in ast.walk(statement)):
        raise CannotRepeatError("the statements of the loss contain a loop")
    _check_names([*before, ast.Expr(root)])
    return Statements(file, before, root, block[last])


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
    """Return the names that are read or stored, without those that a comprehension or a lambda has for itself."""
    own: set[str] = set()
    for one in ast.walk(node):
        if isinstance(one, ast.comprehension):
            own |= {name.id for name in ast.walk(one.target) if isinstance(name, ast.Name)}
        elif isinstance(one, ast.arg):
            own.add(one.arg)
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, kind)} - own


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


def backward_at(frame: FrameType | None, losses: list[Any], roots: list[Tensor]) -> Backward | None:
    """Return where the program calls backward, given its frame."""
    if frame is None:
        return None
    value = losses[0] if len(losses) == 1 and isinstance(losses[0], float) else None
    return Backward(frame.f_code, frame.f_lineno, value, roots)
