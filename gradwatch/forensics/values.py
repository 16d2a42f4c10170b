"""The values that expressions have: what was made or assigned here, and attributes of objects of the program."""

from __future__ import annotations

import ast
import types
from abc import ABC, abstractmethod
from typing import Any

import torch

from gradwatch.forensics.names import storage_of, tensors_in
from gradwatch.forensics.pure import attribute, getter_of, is_missing, is_tensor
from gradwatch.forensics.source import Scope, plain_function
from gradwatch.forensics.standins import CannotRepeatError


class Unknown:
    """The value of a name that a statement changes which is not understood.

    Args:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Applied:
    """The method `apply` of a function of autograd that the user has written.

    Args:
        cls: its class.
    """

    def __init__(self, cls: type[torch.autograd.Function]) -> None:
        self.cls = cls


class Values(ABC):
    """Knows which values were made here, and reads attributes without running code of the user's."""

    def __init__(self) -> None:
        self._own: dict[int, Any] = {}  # lists and dicts that were made here, so that they may be changed
        self._fresh: dict[int, Any] = {}  # tensors that were made here, by their memory
        self._assigned: dict[
            tuple[int, str], tuple[Any, Any]
        ] = {}  # attributes that were assigned here, with their objects

    @abstractmethod
    def enter(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of the user's gives, computed from its source."""

    def made(self, made: Any) -> Any:
        """Remember a list or a dict that was made here, and return it."""
        self._own[id(made)] = made
        return made

    def computed(self, node: ast.expr, scope: Scope, made: ast.expr, **given: Any) -> Any:
        """Compute an expression, see `at`, and remember tensors whose memory was made by it."""
        result = at(node, scope, made, **given)
        before = {storage_of(one) for _, one in tensors_in(given)}
        owner: Any = getattr(given.get("f"), "__self__", None)
        before |= {storage_of(owner)} if is_tensor(owner) else set()
        for _, one in tensors_in(result):
            if is_tensor(one) and (storage := storage_of(one)) not in before:
                self._fresh[storage] = one
        return result

    def is_own(self, value: Any) -> bool:
        """Return whether a list, a dict or the memory of a tensor was made here, so that the program does not have it."""
        return id(value) in self._own or (is_tensor(value) and storage_of(value) in self._fresh)

    def attribute_of(self, holder: Any, name: str) -> Any:
        """Return an attribute, or what the source of a property gives.

        Raises:
            LookupError, AttributeError: that is not possible without running code of the user's.
        """
        if (id(holder), name) in self._assigned:
            return self._assigned[id(holder), name][1]
        if isinstance(holder, torch.autograd.function.FunctionCtx) or self._may_append(holder, name):
            return getattr(holder, name)
        if isinstance(holder, type) and issubclass(holder, torch.autograd.Function) and name == "apply":
            return Applied(holder)
        getter = getter_of(holder, name)
        return self.enter(getter, (holder,), {}) if getter is not None else attribute(holder, name)

    def of_base(self, node: ast.Attribute, scope: Scope) -> Any:
        """Return a method of a base class, as of `super()`."""
        holder, cls = scope.names.get("self"), scope.names["__class__"]
        kinds = type(holder).__mro__
        for one in kinds[kinds.index(cls) + 1 :] if cls in kinds else ():
            if isinstance(found := one.__dict__.get(node.attr), types.FunctionType):
                return types.MethodType(found, holder)
        raise refused(node, scope)

    def remember(self, holder: Any, name: str, value: Any) -> None:
        """Have an attribute of an object of the user's a value here, without changing the object."""
        self._assigned[id(holder), name] = holder, value

    def _may_append(self, holder: Any, name: str) -> bool:
        return self.is_own(holder) and name in ("append", "extend", "update")

    def looked_up(self, function: Any, args: tuple[Any, ...], node: ast.Call, scope: Scope) -> Any:
        """Return what `getattr` and `hasattr` give, and `next` of a generator, which is a list here."""
        holder, *rest = args
        if function is next and (holder or rest):
            return holder[0] if holder else rest[0]
        try:
            found = self.attribute_of(holder, rest[0]) if function is not next else None
        except (LookupError, AttributeError):
            if (function is hasattr or len(args) == 3) and is_missing(holder, rest[0]):
                return False if function is hasattr else args[2]
            raise refused(node, scope) from None
        return True if function is hasattr else found


def at(node: ast.expr, scope: Scope, made: ast.expr, **given: Any) -> Any:
    """Compute an expression on a frame of the line in the user's program on which it stands."""
    ast.copy_location(made, node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # as Python counts lines of method calls
        made.lineno = node.func.end_lineno or node.lineno
    code = compile(ast.fix_missing_locations(ast.Expression(made)), scope.file, "eval")
    return eval(code, {}, given)  # noqa: S307  one operation, on values that were looked at


def name_at(name: str, node: ast.expr) -> ast.Name:
    """Return a name on the line of a part of the source."""
    return ast.copy_location(ast.Name(name, ast.Load()), node)


def is_users_function(function: Any) -> bool:
    """Return whether a function is one whose source is computed."""
    plain = plain_function(function)
    bound_to_tensor = isinstance(function, types.MethodType) and is_tensor(function.__self__)
    return (
        isinstance(plain, types.FunctionType) and not str(plain.__module__).startswith("torch.") and not bound_to_tensor
    )


def refused(node: ast.AST, scope: Scope) -> CannotRepeatError:
    """Return the error of a part of the source that is not understood."""
    told, line = " ".join(ast.unparse(node).split()), getattr(node, "lineno", 0)
    return CannotRepeatError(
        f"`{told[:60]}` in line {line} of {scope.file.rpartition('/')[2]} may do more than compute"
    )
