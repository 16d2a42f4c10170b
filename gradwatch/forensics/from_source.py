"""What a program computes of the outputs of its model, computed again from its source with copies of these."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradwatch.forensics.evaluate import Evaluator
from gradwatch.forensics.source import Scope, plain_function
from gradwatch.forensics.standins import CannotRepeatError
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.callers import Caller
    from gradwatch.forensics.statements import Statements

NO_CALL = "the call of the model is not found among the statements of the loss"


class NotCalledError(CannotRepeatError):
    """Raised if statements do not call the model as often as it was called."""


class _Outputs:
    """Stands for the calls of a model, or of its parts, each of which gives its output once."""

    def __init__(self, calls: list[Call], outputs: list[Any]) -> None:
        modules = [unwrapped(one.module) for one in calls]
        self._modules = {id(one) for one in modules}
        self.left = list(zip(modules, outputs, strict=True))

    def __call__(self, function: Any) -> Any:
        module = unwrapped(function) if isinstance(function, nn.Module) else None
        if module is None or id(module) not in self._modules:
            return NotImplemented
        place = next((number for number, (one, _) in enumerate(self.left) if one is module), None)
        if place is None:
            raise CannotRepeatError("the statements of the loss call the model more often than the program has")
        return self.left.pop(place)[1]


def evaluated(calls: list[Call], scope: Scope, source: Statements, outputs: list[Any]) -> Iterator[Any]:
    """Yield what the statements of a function that is running compute.

    Raises:
        CannotRepeatError: they are not understood, or do not call the model as often as it was called.
    """
    called = _Outputs(calls, outputs)
    evaluator = Evaluator(called)
    evaluator.run(source.before, scope)
    root = evaluator.value(source.root, scope)
    if called.left:
        raise NotCalledError(NO_CALL)
    yield root


def resumed(calls: list[Call], callers: tuple[Caller, ...], autocast: Any, outputs: list[Any]) -> Iterator[Any]:
    """Yield what each of the functions returns that called the model, the innermost first.

    Raises:
        CannotRepeatError: their source is not understood.
    """
    called = _Outputs(calls, outputs)
    with ExitStack() as around:
        if autocast is not None:
            on, dtype, cache = autocast
            around.enter_context(torch.autocast("cpu", dtype=dtype, enabled=on, cache_enabled=cache))
        value, inner = None, None
        for caller in callers:
            once = _Once(inner, value, called)
            value = Evaluator(once, around).resume(caller.code, caller.line, caller.scope())
            if not once.used:
                raise CannotRepeatError(NO_CALL)
            if not called.left:
                yield value
            inner = caller.code


class _Once:
    """Stands for the call of a function that has returned a value, or for the first of the model, and for later ones of it."""

    def __init__(self, code: CodeType | None, value: Any, called: _Outputs) -> None:
        self._code = code
        self._value = value
        self._called = called
        self.used = False

    def __call__(self, function: Any) -> Any:
        if self._code is not None and not self.used and _runs(function, self._code):
            self.used = True
            return self._value
        given = self._called(function)
        self.used = self.used or (self._code is None and given is not NotImplemented)
        return given


def _runs(function: Any, code: CodeType) -> bool:
    """Return whether calling a function runs code, itself or as what it wraps."""
    if isinstance(function, nn.Module):
        function = inspect.getattr_static(function, "forward", None)
    while function is not None:
        function = plain_function(function)
        if getattr(function, "__code__", None) is code:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
