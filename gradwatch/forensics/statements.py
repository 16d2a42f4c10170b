"""The statements between the call of a model and its backward on which the loss depends, found in the source of the program."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.forensics.multiples import multiples_of
from gradwatch.forensics.source import tree_of
from gradwatch.forensics.standins import CannotRepeatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType
    from typing import Any, TypeGuard

    from torch import Tensor

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.multiples import Multiple

_FURTHEST = 24  # statements
_CHANGES = ("append", "extend", "update")  # methods of containers
_LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.Try, ast.FunctionDef, ast.ClassDef)


class Backward(NamedTuple):
    """Where a program has called backward.

    Attributes:
        code, line: function and line.
        loss: value of the loss; None if it is not known.
        roots: tensors from which it starts.
        calls: forwards to which it belongs.
        multiples: the root and what it is a multiple of, if a function has ended that called the model.
    """

    code: CodeType
    line: int
    loss: float | None
    roots: list[Tensor]
    calls: list[Call]
    multiples: tuple[Multiple, ...] = ()


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
    block, first, last = _block(_tree(file), call, backward)
    root = _root_of(block[last], backward)
    before = [] if first == last else _slice(block[first:last], root)
    if any(isinstance(one, _LOOPS) for statement in before for one in ast.walk(statement)):
        raise CannotRepeatError("the statements of the loss contain a loop")
    check_names([*before, ast.Expr(root)])
    return Statements(file, before, root, block[last])


def reaching_back(file: str, function: int, line: int, root: ast.expr | None = None) -> Iterator[Statements]:
    """Yield the statements of a loss: the last on which it depends, the last two, and so on, as far back as its function goes.

    Args:
        file: file of the program.
        function: line on which the function begins that calls backward, or a function of the program that does so.
        line: line of the call.
        root: the loss; None: that of which backward is called.

    Raises:
        CannotRepeatError: they are not understood.
    """
    before, last = _before(_tree(file), function, line)
    root = _root_of(last, line) if root is None else root
    whole = _slice(before, root)
    for start in range(len(whole), max(-1, len(whole) - _FURTHEST), -1):
        yield Statements(file, whole[start:], root, last)


def arguments_on(file: str, function: int, line: int) -> list[ast.expr]:
    """Return the arguments of the calls on a line that are names, attributes or elements, as in accelerator.backward(loss)."""
    _, last = _before(_tree(file), function, line)
    calls = [one for one in ast.walk(last) if _is_call_on(one, line)]
    return [given for one in calls for given in one.args if isinstance(given, (ast.Name, ast.Attribute, ast.Subscript))]


def _tree(file: str) -> ast.Module:
    tree = tree_of(file)
    if tree is None:
        raise CannotRepeatError("the source of the program is not at hand")
    return tree


def _before(tree: ast.AST, function: int, line: int) -> tuple[list[ast.stmt], ast.stmt]:
    """Return the statements before a call in the blocks around it, the outermost first, and its own statement."""
    before: list[ast.stmt] = []
    inner: ast.stmt | None = None
    around: ast.AST | None = tree
    while around is not None:
        blocks = [getattr(around, name, None) for name in ("body", "orelse", "finalbody")]
        found = [
            (block, one) for block in blocks if isinstance(block, list) for one in block if _has_call_on(one, line)
        ]
        around = None
        if found:  # of several statements on one line, that of backward
            block, inner = next((one for one in found if _has_call_on(one[1], line, "backward")), found[0])
            before += block[: block.index(inner)]
            around = inner
            first = [inner.lineno, *(one.lineno for one in getattr(inner, "decorator_list", ()))]
            if isinstance(inner, ast.FunctionDef) and min(first) <= function:
                before = []  # what stands outside of it is none of its statements
    if inner is None:
        raise CannotRepeatError("the statement that calls backward is not understood")
    return before, inner


def _has_call_on(node: ast.AST, line: int, name: str = "") -> bool:
    return any(_is_call_on(one, line, name) for one in ast.walk(node))


def _is_call_on(node: ast.AST, line: int, name: str = "") -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or not node.lineno <= line <= (node.end_lineno or 0):
        return False
    return not name or (isinstance(node.func, ast.Attribute) and node.func.attr == name)


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
                stored = _names(value.func.value, ast.Load) if value.func.attr in _CHANGES else set()
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


def changed_by(statement: ast.stmt) -> set[str]:
    """Return the names that a statement may change: those it assigns to, and those of which it changes what they hold."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    changed = _names(statement, ast.Store)
    for one in ast.walk(statement):
        if isinstance(one, ast.alias):
            changed.add((one.asname or one.name).partition(".")[0])
        if isinstance(one, ast.Subscript) and isinstance(one.ctx, ast.Store):
            changed |= _names(one, ast.Load)
        if isinstance(one, ast.Call):
            name = one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
            in_place = {keyword.arg for keyword in one.keywords} & {"inplace", "out"}
            if in_place or (name.endswith("_") and not name.endswith("__")):
                changed |= _names(one, ast.Load)
            elif name in _CHANGES and isinstance(one.func, ast.Attribute):
                changed |= _names(one.func.value, ast.Load)
    return changed


def check_names(body: list[ast.stmt]) -> None:
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


def backward_at(frame: FrameType | None, losses: list[Any], roots: list[Tensor], calls: list[Call]) -> Backward | None:
    """Return where the program calls backward, given its frame."""
    if frame is None:
        return None
    value = losses[0] if len(losses) == 1 and isinstance(losses[0], float) else None
    multiples = tuple(multiples_of(roots[0])) if calls[0].callers and len(roots) == 1 else ()
    return Backward(frame.f_code, frame.f_lineno, value, roots, calls, multiples)
