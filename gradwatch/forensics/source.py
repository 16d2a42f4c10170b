"""The source of functions: their definitions, found by their code, and the values of names inside of them."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import types
from collections import ChainMap
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.forensics.frames import locals_of

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_REFUSED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Scope(NamedTuple):
    """Where expressions stand: their file, and the values of names."""

    file: str
    names: MutableMapping[str, Any]

    @classmethod
    def of_frame(cls, frame: types.FrameType) -> Scope:
        """Return the scope of a function that is running; what is assigned in it is not seen by the function."""
        outside: Any = ChainMap({}, locals_of(frame), frame.f_globals, vars(builtins))
        return cls(frame.f_code.co_filename, outside)

    def inner(self) -> Scope:
        """Return a scope inside this one, as of a comprehension."""
        names: Any = ChainMap({}, self.names)
        return Scope(self.file, names)


@lru_cache(maxsize=8)
def tree_of(file: str) -> ast.Module | None:
    """Return the tree of a source file; None if it is not at hand or not Python."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None


def plain_function(function: Any) -> Any:
    """Return the function of a bound method; another function itself."""
    return function.__func__ if isinstance(function, types.MethodType) else function


def definition_of(code: types.CodeType) -> ast.FunctionDef | ast.Lambda | None:
    """Return the definition of a function; None if it is not found, is not known for certain, or is a generator."""
    tree = tree_of(code.co_filename) if not code.co_flags & _REFUSED else None
    found: list[ast.FunctionDef | ast.Lambda] = []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Lambda) and code.co_name == "<lambda>" and node.lineno == code.co_firstlineno:
            found.append(node)
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            found += [node] if first == code.co_firstlineno else []
    matching = found if len(found) == 1 else [one for one in found if _has_code(one, code)]
    return matching[0] if len(matching) == 1 else None


def _has_code(node: ast.FunctionDef | ast.Lambda, code: types.CodeType) -> bool:
    """Return whether a lambda is the one of a code object, by the columns of its instructions."""
    if not isinstance(node, ast.Lambda) or not hasattr(code, "co_positions"):
        return False
    body = node.body
    return (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset) in set(code.co_positions())


def scope_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope:
    """Return the scope of a function, or of a bound method, that is called with these arguments.

    Raises:
        TypeError: it does not take them.
    """
    plain = plain_function(function)
    bound = inspect.signature(plain, follow_wrapped=False).bind(
        *((function.__self__,) if isinstance(function, types.MethodType) else ()), *args, **kwargs
    )
    bound.apply_defaults()
    cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True)
    outside = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    names: Any = ChainMap(dict(bound.arguments), outside, plain.__globals__, vars(builtins))
    return Scope(plain.__code__.co_filename, names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  raises if it is empty
    except ValueError:
        return False
    return True
