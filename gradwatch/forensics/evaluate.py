"""Computing a loss again from its source, without running code of the user's.

Each operation of the source is computed by itself, if it is one of torch or of Python that changes nothing. Functions of the
user's are not called: their source is computed in the same way. What is not understood is left out, and what depends on it is
refused.
"""

from __future__ import annotations

import ast
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.errors import words_of
from gradwatch.forensics.expressions import Expressions
from gradwatch.forensics.pure import attribute, is_context, is_plain, is_record
from gradwatch.forensics.source import Scope, definition_of, plain_function, scope_of
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.forensics.statements import changed_by
from gradwatch.forensics.values import Unknown, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType

_DEEPEST = 20  # functions inside each other
_ENDS = (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FAILURES = (CannotRepeatError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Returned(Exception):  # noqa: N818  not an error
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class _LeftError(Exception):
    def __init__(self, *, ends: bool) -> None:
        super().__init__()
        self.ends = ends


class Evaluator(Expressions):
    """Computes statements, expressions and functions.

    Args:
        called: as in `Expressions`.
        around: contexts in which a function is resumed, which may be those of its own statements.
    """

    def __init__(self, called: Callable[[Any], Any], around: ExitStack | None = None) -> None:
        super().__init__(called)
        self._depth = 0
        self._around = around

    def run(self, statements: Sequence[ast.stmt], scope: Scope) -> None:
        """Run statements; leave out one that is not understood, and refuse what depends on the names that it would change.

        Raises:
            CannotRepeatError: a statement is not understood, and what follows depends on it altogether.
        """
        for one in statements:
            visit = getattr(self, f"run_{type(one).__name__.lower()}", None)
            try:
                if visit is None:
                    raise refused(one, scope)
                visit(one, scope)
            except _FAILURES as error:
                if _may_end(one):
                    raise
                for name in changed_by(one):
                    scope.names[name] = Unknown(str(error) if isinstance(error, CannotRepeatError) else words_of(error))

    def resume(self, code: CodeType, line: int, scope: Scope) -> Any:
        """Return what a function gives from one of its lines on, with the names that it had there.

        Raises:
            CannotRepeatError: its source is not understood.
        """
        node = definition_of(code)
        if node is None:
            raise CannotRepeatError(f"the source of `{code.co_name}` is not understood")
        if isinstance(node, ast.Lambda):
            return self.value(node.body, scope)
        try:
            self._run_from(node.body, line, scope)
        except _Returned as returned:
            return returned.value
        return None

    def _run_from(self, block: Sequence[ast.stmt], line: int, scope: Scope) -> None:
        """Run a block from the statement on a line on."""
        place, first = next(
            (found for found in enumerate(block) if found[1].lineno <= line <= (found[1].end_lineno or 0)),
            (0, None),
        )
        inner = next((one for one in _blocks_of(first) if one[0].lineno <= line <= (one[-1].end_lineno or 0)), None)
        if first is None or (inner is not None and not isinstance(first, (ast.If, ast.With, ast.Try))):
            raise CannotRepeatError(f"line {line} of {scope.file.rpartition('/')[2]} is in a loop")
        if inner is None:
            self.run([first], scope)
        elif isinstance(first, ast.With):
            if any(type(one) is torch.autocast for one in self._contexts(first, scope)) and self._around is not None:
                self._around.close()  # it was the statement's
            with ExitStack() as stack:
                for context in self._contexts(first, scope):
                    stack.enter_context(context)
                self._run_from(inner, line, scope)
        else:
            self._run_from(inner, line, scope)
            if isinstance(first, ast.Try):
                self.run([*(first.orelse if inner is first.body else ()), *first.finalbody], scope)
        self.run(block[place + 1 :], scope)

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
            if self._ends_loop(node.body, scope):
                break

    def run_while(self, node: ast.While, scope: Scope) -> None:
        """Run a loop."""
        if node.orelse:
            raise refused(node, scope)
        while self.truth(node.test, scope):
            if self._ends_loop(node.body, scope):
                break

    def _ends_loop(self, body: Sequence[ast.stmt], scope: Scope) -> bool:
        """Run the body of a loop once, and return whether it ends the loop."""
        try:
            self.run(body, scope)
        except _LeftError as left:
            return left.ends
        return False

    def run_break(self, _: ast.Break, __: Scope) -> None:
        """End a loop."""
        raise _LeftError(ends=True)

    def run_continue(self, _: ast.Continue, __: Scope) -> None:
        """Go on with a loop."""
        raise _LeftError(ends=False)

    def run_with(self, node: ast.With, scope: Scope) -> None:
        """Run statements in a context of torch's, such as autocast."""
        with ExitStack() as stack:
            for context in self._contexts(node, scope):
                stack.enter_context(context)
            self.run(node.body, scope)

    def _contexts(self, node: ast.With, scope: Scope) -> list[Any]:
        contexts = [self.value(item.context_expr, scope) for item in node.items]
        for item, context in zip(node.items, contexts, strict=True):
            if not is_context(context) or item.optional_vars is not None:
                raise refused(item.context_expr, scope)
        return contexts

    def run_try(self, node: ast.Try, scope: Scope) -> None:
        """Run statements that have not failed."""
        self.run([*node.body, *node.orelse, *node.finalbody], scope)

    def run_pass(self, node: ast.Pass, scope: Scope) -> None:
        """Do nothing."""

    def run_assert(self, node: ast.Assert, scope: Scope) -> None:
        """Do nothing: it has held."""

    def assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        """Assign a value to a name, to several, or to an attribute; one of the user's objects is not changed.

        Raises:
            CannotRepeatError: the target is another.
        """
        if isinstance(target, ast.Name):
            scope.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)) and (
            is_plain(value) or type(value) in (list, tuple) or is_record(value)
        ):
            values = list(value)
            if len(values) != len(target.elts):
                raise refused(target, scope)
            for part, one in zip(target.elts, values, strict=True):
                self.assign(part, one, scope)
        elif isinstance(target, ast.Subscript) and self.is_own(holder := self.value(target.value, scope)):
            self._assign_item(holder, target, value, scope)
        elif isinstance(target, ast.Attribute):
            holder = self.value(target.value, scope)
            if isinstance(holder, torch.autograd.function.FunctionCtx):  # such as ctx.scale = scale
                setattr(holder, target.attr, value)
            else:
                self.remember(holder, target.attr, value)
        else:
            raise refused(target, scope)

    def _assign_item(self, holder: Any, target: ast.Subscript, value: Any, scope: Scope) -> None:
        """Assign to an item of a list, a dict or a tensor that was made here."""
        if type(holder) is not torch.Tensor:
            holder[self.value(target.slice, scope)] = value
            return
        index = self.value(target.slice, scope)
        if not (is_plain(index) and is_plain(value)):
            raise refused(target, scope)
        made = ast.Call(ast.Name("f", ast.Load()), [ast.Name("a", ast.Load()), ast.Name("b", ast.Load())], [])
        self.computed(target, scope, made, f=holder.__setitem__, a=index, b=value)

    # Functions.

    def enter(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of the user's gives, computed from its source.

        Raises:
            CannotRepeatError: it is not understood.
        """
        plain = plain_function(function)
        node = definition_of(plain.__code__)
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


def _may_end(statement: ast.stmt) -> bool:
    """Return whether the statements after one may not be run, so that it has to be understood."""
    if isinstance(statement, _DEFINITIONS):
        return False
    return isinstance(statement, ast.Raise) or any(isinstance(part, _ENDS) for part in ast.walk(statement))


def _blocks_of(node: ast.stmt | None) -> list[list[ast.stmt]]:
    """Return the blocks of statements inside of one."""
    blocks = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
    handlers = [one.body for one in getattr(node, "handlers", ())]
    return [one for one in (*blocks, *handlers) if one]
