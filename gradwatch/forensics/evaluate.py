"""Computing a loss again from its source, without running code of the user's.

Each operation of the source is computed by itself, if it is one of torch or of Python that changes nothing. Functions of the
user's are not called: their source is computed in the same way. What is not understood is refused.
"""

from __future__ import annotations

import ast
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics.expressions import Expressions, refused
from gradwatch.forensics.pure import attribute, is_context, is_plain
from gradwatch.forensics.source import Scope, definition_of, plain_function, scope_of
from gradwatch.forensics.standins import CannotRepeatError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DEEPEST = 20  # functions inside each other


class _Returned(Exception):  # noqa: N818  not an error
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Evaluator(Expressions):
    """Computes statements, expressions and functions.

    Args:
        called: as in `Expressions`.
    """

    def __init__(self, called: Callable[[Any], Any]) -> None:
        super().__init__(called)
        self._depth = 0

    def run(self, statements: Sequence[ast.stmt], scope: Scope) -> None:
        """Run statements.

        Raises:
            CannotRepeatError: a statement is not understood.
        """
        for one in statements:
            visit = getattr(self, f"run_{type(one).__name__.lower()}", None)
            if visit is None:
                raise refused(one, scope)
            visit(one, scope)

    # Kinds of statements.

    def run_assign(self, node: ast.Assign, scope: Scope) -> None:
        """Assign a value to names."""
        value = self.value(node.value, scope)
        for target in node.targets:
            self.assign(target, value, scope)

    def run_annassign(self, node: ast.AnnAssign, scope: Scope) -> None:
        """Assign a value to a name."""
        if node.value is not None:
            self.assign(node.target, self.value(node.value, scope), scope)

    def run_augassign(self, node: ast.AugAssign, scope: Scope) -> None:
        """Assign a value that is changed, without changing it in place."""
        if not isinstance(node.target, ast.Name):
            raise refused(node, scope)
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        both = ast.copy_location(ast.BinOp(before, node.op, node.value), node)
        self.assign(node.target, self.value(both, scope), scope)

    def run_expr(self, node: ast.Expr, scope: Scope) -> None:
        """Compute an expression, such as of losses.append(loss)."""
        self.value(node.value, scope)

    def run_return(self, node: ast.Return, scope: Scope) -> None:
        """End a function."""
        raise _Returned(self.value(node.value, scope) if node.value is not None else None)

    def run_if(self, node: ast.If, scope: Scope) -> None:
        """Run the branch that is chosen."""
        self.run(node.body if self.truth(node.test, scope) else node.orelse, scope)

    def run_for(self, node: ast.For, scope: Scope) -> None:
        """Run a loop."""
        if node.orelse:
            raise refused(node, scope)
        for one in self.items(node.iter, scope):
            self.assign(node.target, one, scope)
            self.run(node.body, scope)

    def run_with(self, node: ast.With, scope: Scope) -> None:
        """Run statements in a context of torch's, such as autocast."""
        with ExitStack() as stack:
            for item in node.items:
                context = self.value(item.context_expr, scope)
                if not is_context(context) or item.optional_vars is not None:
                    raise refused(item.context_expr, scope)
                stack.enter_context(context)
            self.run(node.body, scope)

    def run_pass(self, node: ast.Pass, scope: Scope) -> None:
        """Do nothing."""

    def run_assert(self, node: ast.Assert, scope: Scope) -> None:
        """Do nothing: it has held."""

    def assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        """Assign a value to a name, to several, or to an attribute of the context of a function of autograd.

        Raises:
            CannotRepeatError: the target is another.
        """
        if isinstance(target, ast.Name):
            scope.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)) and (is_plain(value) or type(value) in (list, tuple)):
            values = list(value)
            if len(values) != len(target.elts):
                raise refused(target, scope)
            for part, one in zip(target.elts, values, strict=True):
                self.assign(part, one, scope)
        elif isinstance(target, ast.Attribute):  # such as ctx.scale = scale
            holder = self.value(target.value, scope)
            if not isinstance(holder, torch.autograd.function.FunctionCtx):
                raise refused(target, scope)
            setattr(holder, target.attr, value)
        else:
            raise refused(target, scope)

    # Functions.

    def enter(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of the user's gives, computed from its source.

        Raises:
            CannotRepeatError: it is not understood.
        """
        plain = plain_function(function)
        node = definition_of(plain)
        if node is None or self._depth >= _DEEPEST:
            raise CannotRepeatError(f"the source of `{plain.__name__}` is not understood")
        scope = scope_of(function, args, kwargs)
        self._depth += 1
        try:
            if isinstance(node, ast.Lambda):
                return self.value(node.body, scope)
            self.run(node.body, scope)
        except _Returned as returned:
            return returned.value
        finally:
            self._depth -= 1
        return None

    def apply(self, cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of autograd gives whose forward and backward are written by the user.

        Raises:
            CannotRepeatError: it is not understood.
        """
        if kwargs or any(
            "setup_context" in one.__dict__ for one in cls.__mro__ if one.__module__ != "torch.autograd.function"
        ):
            raise CannotRepeatError(f"`{cls.__name__}` is not understood")

        def forward(ctx: Any, *given: Any) -> Any:
            return self.enter(attribute(cls, "forward"), (ctx, *given), {})

        def backward(ctx: Any, *gradients: Any) -> Any:
            return self.enter(attribute(cls, "backward"), (ctx, *gradients), {})

        body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        made: Any = type(cls.__name__, (torch.autograd.Function,), body)  # the nodes of its graph have its name
        return made.apply(*args)
