"""Running the statements of a loss once more, with the output of the model in place of its call. This runs code of the user's."""

from __future__ import annotations

import ast
import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from gradwatch.forensics.from_source import NO_CALL
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

    from gradwatch.forensics.statements import Statements

_OUTPUT, _ROOT = "__gradwatch_output__", "__gradwatch_root__"


def run(model: nn.Module, names: dict[str, Any], source: Statements, outputs: list[Any]) -> Iterator[Any]:
    """Run statements of the user's with the output in place of the call of the model, and yield what they compute.

    Raises:
        CannotRepeatError: they do not call the model once.
    """
    code = _code(unwrapped(model), names, source, source.file)
    names[_OUTPUT] = lambda: outputs[0]
    exec(code, names)  # noqa: S102  the user has asked for it
    yield names[_ROOT]


def _code(model: nn.Module, names: dict[str, Any], source: Statements, file: str) -> CodeType:
    """Return the statements with the output in place of the call of the model."""
    source = copy.deepcopy(source)
    assign = ast.Assign([ast.Name(_ROOT, ast.Store())], source.root)
    swap = _Swap(model, names)
    body = [swap.visit(one) for one in [*source.before, ast.copy_location(assign, source.last)]]
    if swap.count != 1:
        raise CannotRepeatError(NO_CALL)
    return compile(ast.fix_missing_locations(ast.Module(body, [])), file, "exec")


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
