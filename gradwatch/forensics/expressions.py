"""Computing expressions of the user's source, each operation by itself, if it is one that changes nothing."""

from __future__ import annotations

import ast
import inspect
import types
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.pure import (
    attribute,
    changed_in_place,
    is_plain,
    is_record,
    item_of,
    makes_context,
    may_call,
    without_partial,
)
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.forensics.values import Applied, Unknown, Values, is_users_function, name_at, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gradwatch.forensics.source import Scope

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


class Expressions(Values):
    """Computes expressions. The methods for kinds of nodes have their names in small letters.

    Args:
        called: given a value that is called in the source, returns what the call gives; `NotImplemented` for all other values.
            It stands for the call of the model.
    """

    def __init__(self, called: Callable[[Any], Any]) -> None:
        super().__init__()
        self._called = called
        self._left = _MOST

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
        return self._is_true(self.value(node, scope), node, scope)

    def _is_true(self, value: Any, node: ast.expr, scope: Scope) -> bool:
        if is_plain(value) or type(value) in (list, tuple, dict):
            return bool(value)
        if hasattr(type(value), "__bool__") or hasattr(type(value), "__len__"):
            raise refused(node, scope)
        return True

    def items(self, node: ast.expr, scope: Scope) -> Iterator[Any]:
        """Yield the items of an expression over which a loop runs."""
        value = self.value(node, scope)
        if not is_plain(value) and not isinstance(value, (*_VIEWS, list, tuple)) and not is_record(value):
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

    # Kinds of expressions.

    def visit_constant(self, node: ast.Constant, _: Scope) -> Any:
        """Return a number or a string."""
        return node.value

    def visit_joinedstr(self, node: ast.JoinedStr, scope: Scope) -> str:
        """Return a string with numbers and strings in it."""
        parts = []
        for one in node.values:
            value = self.value(one.value if isinstance(one, ast.FormattedValue) else one, scope)
            if type(value) not in (str, int, float, bool) or getattr(one, "format_spec", None) is not None:
                raise refused(node, scope)
            parts.append(repr(value) if getattr(one, "conversion", -1) == ord("r") else str(value))
        return "".join(parts)

    def visit_name(self, node: ast.Name, scope: Scope) -> Any:
        """Return the value of a name."""
        if node.id not in scope.names:
            raise CannotRepeatError(f"`{node.id}` is gone")
        value = scope.names[node.id]
        if isinstance(value, Unknown):
            raise CannotRepeatError(value.reason)
        return value

    def visit_attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        """Return an attribute; of a property, what its source gives."""
        if _is_super(node.value) and "__class__" in scope.names:
            return self.of_base(node, scope)
        try:
            return self.attribute_of(self.value(node.value, scope), node.attr)
        except (LookupError, AttributeError):
            raise refused(node, scope) from None

    def visit_boolop(self, node: ast.BoolOp, scope: Scope) -> Any:
        """Return what `and` or `or` gives."""
        result: Any = None
        for one in node.values:
            result = self.value(one, scope)
            if self._is_true(result, one, scope) is isinstance(node.op, ast.Or):
                break
        return result

    def visit_namedexpr(self, node: ast.NamedExpr, scope: Scope) -> Any:
        """Assign a value, and return it."""
        value = self.value(node.value, scope)
        self.assign(node.target, value, scope)
        return value

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
        return self.made(list(self._each(node.elts, scope)))

    def visit_dict(self, node: ast.Dict, scope: Scope) -> Any:
        """Return a dict."""
        keys = [self._plain(key, scope) for key in node.keys if key is not None]
        if len(keys) < len(node.keys):
            raise refused(node, scope)
        return self.made(dict(zip(keys, self._each(node.values, scope), strict=True)))

    def visit_listcomp(self, node: ast.ListComp | ast.GeneratorExp, scope: Scope) -> Any:
        """Return a list."""
        if len(node.generators) != 1:
            raise refused(node, scope)
        (over,), inner, made = node.generators, scope.inner(), []
        for one in self.items(over.iter, scope):
            self.assign(over.target, one, inner)
            if all(self.truth(test, inner) for test in over.ifs):
                made.append(self.value(node.elt, inner))
        return self.made(made)

    visit_generatorexp = visit_listcomp

    # Operators.

    def visit_binop(self, node: ast.BinOp, scope: Scope) -> Any:
        """Return what an operator gives."""
        left, right = self._plain(node.left, scope), self._plain(node.right, scope)
        return self.computed(
            node, scope, ast.BinOp(name_at("a", node.left), node.op, name_at("b", node.right)), a=left, b=right
        )

    def visit_unaryop(self, node: ast.UnaryOp, scope: Scope) -> Any:
        """Return what an operator gives."""
        return self.computed(
            node, scope, ast.UnaryOp(node.op, name_at("a", node.operand)), a=self._plain(node.operand, scope)
        )

    def visit_compare(self, node: ast.Compare, scope: Scope) -> Any:
        """Return what a comparison gives."""
        identity = all(isinstance(one, (ast.Is, ast.IsNot)) for one in node.ops)
        values = [(self.value if identity else self._plain)(one, scope) for one in (node.left, *node.comparators)]
        names: list[ast.expr] = [name_at(f"v{place}", node.left) for place in range(len(values))]
        made = ast.Compare(names[0], node.ops, names[1:])
        return self.computed(node, scope, made, **{f"v{place}": value for place, value in enumerate(values)})

    def visit_subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        """Return an element."""
        holder, index = self.value(node.value, scope), self._plain(node.slice, scope)
        if is_record(holder):
            return item_of(holder, index)
        if not is_plain(holder) and type(holder) not in (list, tuple, dict):
            get = inspect.getattr_static(type(holder), "__getitem__", None)
            if get is dict.__dict__["__getitem__"] and type(index) is str and dict.__contains__(holder, index):
                return dict.__getitem__(holder, index)
            if isinstance(get, types.FunctionType) and is_users_function(get):
                return self.enter(types.MethodType(get, holder), (index,), {})
            raise refused(node.value, scope)
        made = ast.Subscript(name_at("a", node.value), name_at("b", node.slice), ast.Load())
        return self.computed(node, scope, made, a=holder, b=index)

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
        if function in (getattr, hasattr) or (function is next and type(args[0]) is list):
            return self.looked_up(function, args, node, scope)
        if isinstance(function, Applied):
            return self.apply(function.cls, args, kwargs)
        if is_users_function(function):
            return self.enter(function, args, kwargs)
        if _is_users_module(function):
            return self.enter(attribute(function, "forward"), args, kwargs)
        self._check_call(function, args, kwargs, node, scope)
        made = ast.Call(
            name_at("f", node.func),
            [ast.Starred(name_at("a", node), ast.Load())],
            [ast.keyword(None, name_at("k", node))],
        )
        result = self.computed(node, scope, made, f=function, a=args, k=kwargs)
        return self.made(result) if function in (list, dict) else result

    def _check_call(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: ast.Call, scope: Scope
    ) -> None:
        holder = getattr(function, "__self__", None)
        if isinstance(holder, torch.autograd.function.FunctionCtx) or id(holder) in self._own:
            return
        changes = changed_in_place(function, args, kwargs)
        if not (
            makes_context(function) or may_call(function, kwargs) or (changes is not None and self.is_own(changes))
        ):
            raise refused(node, scope)
        if not all(_may_be_given(function, one) for one in (*args, *kwargs.values())):
            raise refused(node, scope)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args


def _is_users_module(function: Any) -> bool:
    if not isinstance(function, nn.Module) or type(function).__module__.startswith("torch."):
        return False
    return not any(getattr(function, name, None) for name in _HOOKS)


def _may_be_given(function: Any, value: Any) -> bool:
    """Return whether a function of torch or of Python runs no code of the user's on an argument."""
    if function is isinstance or is_plain(value) or isinstance(value, _VIEWS):
        return True
    return type(value) in (list, tuple) and function in (len, zip, enumerate, reversed)
