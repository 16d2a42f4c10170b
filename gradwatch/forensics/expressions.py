"""Computing expressions of the user's source, each operation by itself, if it is one that changes nothing."""

from __future__ import annotations

import ast
import types
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.pure import attribute, is_plain, is_tensor, makes_context, may_call, without_partial
from gradwatch.forensics.source import Scope, plain_function
from gradwatch.forensics.standins import CannotRepeatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_MOST = 20_000  # expressions
_VIEWS: tuple[Any, ...] = (
    zip,
    enumerate,
    reversed,
    type({}.items()),
    type({}.keys()),
    type({}.values()),
    types.GeneratorType,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Applied:
    """The method `apply` of a function of autograd that the user has written.

    Args:
        cls: its class.
    """

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        self.cls = cls


class Expressions(ABC):
    """Computes expressions. The methods for kinds of nodes have their names in small letters.

    Args:
        called: given a value that is called in the source, returns what the call gives; `NotImplemented` for all other values.
            It stands for the call of the model.
    """

    def __init__(self, called: Callable[[Any], Any]) -> None:
        self._called = called
        self._own: dict[int, list[Any]] = {}  # lists that were made here, so that they may be appended to
        self._left = _MOST

    @abstractmethod
    def enter(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of the user's gives, computed from its source."""

    @abstractmethod
    def assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        """Assign a value."""

    @abstractmethod
    def apply(self, cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of autograd gives whose forward and backward are written by the user."""

    def value(self, node: ast.expr, scope: Scope) -> Any:
        """Return the value of an expression.

        Raises:
            CannotRepeatError: it is not understood, or would run code of the user's.
        """
        self._left -= 1
        visit = getattr(self, f"visit_{type(node).__name__.lower()}", None)
        if visit is None or self._left < 0:
            raise refused(node, scope)
        return visit(node, scope)

    def truth(self, node: ast.expr, scope: Scope) -> bool:
        """Return whether an expression is true."""
        return bool(self._plain(node, scope))

    def items(self, node: ast.expr, scope: Scope) -> Iterator[Any]:
        """Yield the items of an expression over which a loop runs."""
        value = self.value(node, scope)
        if not is_plain(value) and not isinstance(value, (*_VIEWS, list, tuple)):
            raise refused(node, scope)
        yield from value

    def _plain(self, node: ast.expr, scope: Scope) -> Any:
        value = self.value(node, scope)
        if not is_plain(value) and type(value) not in (list, tuple, dict):
            raise refused(node, scope)
        return value

    def _each(self, parts: Sequence[ast.expr], scope: Scope) -> Iterator[Any]:
        for one in parts:
            if isinstance(one, ast.Starred):
                yield from self.items(one.value, scope)
            else:
                yield self.value(one, scope)

    def _made(self, made: list[Any]) -> list[Any]:
        self._own[id(made)] = made
        return made

    # Kinds of expressions.

    def visit_constant(self, node: ast.Constant, _: Scope) -> Any:
        """Return a number or a string."""
        return node.value

    def visit_name(self, node: ast.Name, scope: Scope) -> Any:
        """Return the value of a name."""
        if node.id not in scope.names:
            raise CannotRepeatError(f"`{node.id}` is gone")
        return scope.names[node.id]

    def visit_attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        """Return an attribute."""
        holder = self.value(node.value, scope)
        if isinstance(holder, torch.autograd.function.FunctionCtx) or self._may_append(holder, node.attr):
            return getattr(holder, node.attr)
        if isinstance(holder, type) and issubclass(holder, torch.autograd.Function) and node.attr == "apply":
            return Applied(holder)
        try:
            return attribute(holder, node.attr)
        except (LookupError, AttributeError):
            raise refused(node, scope) from None

    def _may_append(self, holder: Any, name: str) -> bool:
        return id(holder) in self._own and name in ("append", "extend")

    def visit_boolop(self, node: ast.BoolOp, scope: Scope) -> Any:
        """Return what `and` or `or` gives."""
        result: Any = None
        for one in node.values:
            result = self._plain(one, scope)
            if bool(result) is isinstance(node.op, ast.Or):
                break
        return result

    def visit_ifexp(self, node: ast.IfExp, scope: Scope) -> Any:
        """Return the branch that is chosen."""
        return self.value(node.body if self.truth(node.test, scope) else node.orelse, scope)

    def visit_slice(self, node: ast.Slice, scope: Scope) -> Any:
        """Return a slice."""
        ends = (node.lower, node.upper, node.step)
        return slice(*(self.value(one, scope) if one is not None else None for one in ends))

    def visit_tuple(self, node: ast.Tuple, scope: Scope) -> Any:
        """Return a tuple."""
        return tuple(self._each(node.elts, scope))

    def visit_list(self, node: ast.List, scope: Scope) -> Any:
        """Return a list."""
        return self._made(list(self._each(node.elts, scope)))

    def visit_dict(self, node: ast.Dict, scope: Scope) -> Any:
        """Return a dict."""
        keys = [self._plain(key, scope) for key in node.keys if key is not None]
        if len(keys) < len(node.keys):
            raise refused(node, scope)
        return dict(zip(keys, self._each(node.values, scope), strict=True))

    def visit_listcomp(self, node: ast.ListComp | ast.GeneratorExp, scope: Scope) -> Any:
        """Return a list."""
        if len(node.generators) != 1:
            raise refused(node, scope)
        (over,), inner, made = node.generators, scope.inner(), []
        for one in self.items(over.iter, scope):
            self.assign(over.target, one, inner)
            if all(self.truth(test, inner) for test in over.ifs):
                made.append(self.value(node.elt, inner))
        return self._made(made)

    visit_generatorexp = visit_listcomp

    # Operators.

    def visit_binop(self, node: ast.BinOp, scope: Scope) -> Any:
        """Return what an operator gives."""
        left, right = self._plain(node.left, scope), self._plain(node.right, scope)
        return at(node, scope, ast.BinOp(_name("a", node.left), node.op, _name("b", node.right)), a=left, b=right)

    def visit_unaryop(self, node: ast.UnaryOp, scope: Scope) -> Any:
        """Return what an operator gives."""
        return at(node, scope, ast.UnaryOp(node.op, _name("a", node.operand)), a=self._plain(node.operand, scope))

    def visit_compare(self, node: ast.Compare, scope: Scope) -> Any:
        """Return what a comparison gives."""
        identity = all(isinstance(one, (ast.Is, ast.IsNot)) for one in node.ops)
        values = [(self.value if identity else self._plain)(one, scope) for one in (node.left, *node.comparators)]
        names: list[ast.expr] = [_name(f"v{place}", node.left) for place in range(len(values))]
        made = ast.Compare(names[0], node.ops, names[1:])
        return at(node, scope, made, **{f"v{place}": value for place, value in enumerate(values)})

    def visit_subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        """Return an element."""
        holder, index = self._plain(node.value, scope), self._plain(node.slice, scope)
        made = ast.Subscript(_name("a", node.value), _name("b", node.slice), ast.Load())
        return at(node, scope, made, a=holder, b=index)

    # Calls.

    def visit_call(self, node: ast.Call, scope: Scope) -> Any:
        """Return what a call gives."""
        function = self.value(node.func, scope)
        given = self._called(function)
        if given is not NotImplemented:
            return given
        args = tuple(self._each(node.args, scope))
        kwargs: dict[str, Any] = {}
        for one in node.keywords:
            value = self.value(one.value, scope)
            if one.arg is None and type(value) is not dict:
                raise refused(node, scope)
            kwargs.update(value if one.arg is None else {one.arg: value})
        function, more, keywords = without_partial(function)
        args, kwargs = (*more, *args), {**keywords, **kwargs}
        if isinstance(function, Applied):
            return self.apply(function.cls, args, kwargs)
        if _is_users(function):
            return self.enter(function, args, kwargs)
        if _is_users_module(function):
            return self.enter(attribute(function, "forward"), args, kwargs)
        self._check_call(function, args, kwargs, node, scope)
        made = ast.Call(
            _name("f", node.func),
            [ast.Starred(_name("a", node), ast.Load())],
            [ast.keyword(None, _name("k", node))],
        )
        result = at(node, scope, made, f=function, a=args, k=kwargs)
        return self._made(result) if function is list else result

    def _check_call(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: ast.Call, scope: Scope
    ) -> None:
        holder = getattr(function, "__self__", None)
        if isinstance(holder, torch.autograd.function.FunctionCtx) or id(holder) in self._own:
            return
        if not (makes_context(function) or may_call(function, kwargs)):
            raise refused(node, scope)
        if not all(_may_be_given(function, one) for one in (*args, *kwargs.values())):
            raise refused(node, scope)


def at(node: ast.expr, scope: Scope, made: ast.expr, **given: Any) -> Any:
    """Compute an expression on a frame of the line in the user's program on which it stands."""
    ast.copy_location(made, node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # as Python counts lines of method calls
        made.lineno = node.func.end_lineno or node.lineno
    code = compile(ast.fix_missing_locations(ast.Expression(made)), scope.file, "eval")
    return eval(code, {}, given)  # noqa: S307  one operation, on values that were looked at


def _name(name: str, node: ast.expr) -> ast.Name:
    return ast.copy_location(ast.Name(name, ast.Load()), node)


def _is_users(function: Any) -> bool:
    """Return whether a function is one whose source is computed."""
    plain = plain_function(function)
    bound_to_tensor = isinstance(function, types.MethodType) and is_tensor(function.__self__)
    return (
        isinstance(plain, types.FunctionType) and not str(plain.__module__).startswith("torch.") and not bound_to_tensor
    )


def _is_users_module(function: Any) -> bool:
    if not isinstance(function, nn.Module) or type(function).__module__.startswith("torch."):
        return False
    return not any(getattr(function, name, None) for name in _HOOKS)


def _may_be_given(function: Any, value: Any) -> bool:
    """Return whether a function of torch or of Python runs no code of the user's on an argument."""
    if function is isinstance or is_plain(value) or isinstance(value, _VIEWS):
        return True
    return type(value) in (list, tuple) and function in (len, zip, enumerate, reversed)


def refused(node: ast.AST, scope: Scope) -> CannotRepeatError:
    """Return the error of a part of the source that is not understood."""
    told, line = " ".join(ast.unparse(node).split()), getattr(node, "lineno", 0)
    return CannotRepeatError(
        f"`{told[:60]}` in line {line} of {scope.file.rpartition('/')[2]} may do more than compute"
    )
