"""What is kept of each forward of a step, so that it can be repeated: references to its inputs, and the state of the generator.

Nothing is copied but the state of the CPU's generator (5 kB), and everything is dropped after the step.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradwatch.forensics.call import Call
from gradwatch.forensics.callers import Lasting
from gradwatch.forensics.frames import CALLS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle

    from gradwatch.records import OwnTime

_MOST = 16  # forwards of one step


class _Hook:
    """A hook of a module. Copies and pickles of the module hold one in its place that does nothing.

    Args:
        model: the module, held weakly, since its copies call the same hooks.
        call: bound method to call with the module and the arguments of the hook; its object is held weakly.
        failed: bound method to call with an error of that call, also held weakly; None: the error is raised.
    """

    def __init__(
        self, model: nn.Module, call: Callable[..., None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self._call = weakref.WeakMethod(call)
        self._failed = weakref.WeakMethod(failed) if failed is not None else None

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Pass on the call of a module; nothing while it is compiled."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and module is self._model() and (call := self._call()) is not None:
            try:
                call(module, *args)
            except Exception as error:
                failed = self._failed() if self._failed is not None else None
                if failed is None:
                    raise
                failed(error)

    def __reduce__(self) -> Any:
        """Become a function that takes anything and does nothing, which can be read without gradwatch."""
        return getattr, (nullcontext(), "__exit__")


def captures(hook: Any) -> bool:
    """Return whether a hook of a module is one of a capture."""
    return isinstance(hook, _Hook)


class Capture:
    """The forwards of a model since the last step.

    Args:
        model: the model as it is called: what DistributedDataParallel wraps, but with the wrapper of `torch.compile`.
        begun: called with the module and the arguments of each forward, when it was captured.
        failed: called with an error of the capture itself.
        own_time: counter of the time that watching takes.

    Attributes:
        calls: forwards that may still be followed by a backward or a step.
        lasting: functions that call backward after they have called the model.
    """

    def __init__(
        self,
        model: nn.Module,
        begun: Callable[[nn.Module, Any, Any], None],
        failed: Callable[[Exception], None],
        own_time: OwnTime,
    ) -> None:
        self._begun = begun
        self._model = weakref.ref(model)
        self._handles: list[RemovableHandle] = []
        self._failed = failed
        self._own_time = own_time
        self.calls: list[Call] = []
        self.lasting = Lasting()
        self.on = True
        self._by_parts: bool | None = None  # whether parts of the model are called instead; None if that is not known
        self._open: nn.Module | None = None  # what is being called

    def start(self) -> None:
        """Register the two hooks."""
        model = self._model()
        if model is None or self._handles:
            return
        self._watch(model)
        if self._by_parts or hasattr(type(model), "training_step"):  # as of Lightning, which calls that
            self._watch_parts(model)

    def follow(self, model: nn.Module) -> None:
        """Go on with what is left of a model that is gone, which is not called as a whole."""
        self._model = weakref.ref(model)
        self._by_parts = None

    def backward_begins(self) -> None:
        """Capture the calls of the parts of a model from now on, if a backward has come without a call of the model."""
        model = self._model()
        if self._by_parts is None and self._handles and model is not None:
            self._by_parts = not is_compiled(model)  # which new hooks would have compiled anew
            if self._by_parts:
                self._watch_parts(model)

    def _watch(self, module: nn.Module) -> None:
        self._handles += [
            module.register_forward_pre_hook(_Hook(module, self._begins, self._fail), prepend=True, with_kwargs=True),
            module.register_forward_hook(_Hook(module, self._ends, self._fail), with_kwargs=True),
        ]

    def _watch_parts(self, module: nn.Module) -> None:
        for one in module.children() if not hasattr(module, "_orig_mod") else ():
            if isinstance(one, (nn.ModuleList, nn.ModuleDict)):
                self._watch_parts(one)
            elif next(one.parameters(), None) is not None:
                self._watch(one)

    def stop(self) -> None:
        """Remove the hooks and drop everything."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.clear()

    @property
    def installed(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def forget(self) -> None:
        """Drop the forwards of a step that is over."""
        self.calls.clear()
        self._open = None

    def pause(self, *, on: bool) -> None:
        """Capture nothing while a forward is repeated."""
        self.on = on

    def _begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._model():
            self._by_parts = self._by_parts or False
        elif self._open is not None:  # inside of another call
            return
        if not self.on:
            return
        self._open = module
        if len(self.calls) >= _MOST:
            del self.calls[0]
        call = Call(module, args, kwargs)
        call.called_from(3, self.lasting)
        self.calls.append(call)
        self._begun(module, args, kwargs)
        call.held_up(perf_counter() - call.started)
        self._own_time.seconds += call.took

    def _ends(self, module: nn.Module, _: Any, __: Any, output: Any) -> None:
        if module is not self._open:
            return
        self._open = None
        if self.on and self.calls:
            started, call = perf_counter(), self.calls[-1]
            call.gave(output)
            took = perf_counter() - started
            call.held_up(took)
            self._own_time.seconds += took

    def _fail(self, error: Exception) -> None:
        """Drop what was captured, without which less is known, and report the error."""
        self.calls.clear()
        self._failed(error)


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model or a part of it is compiled."""
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in model.modules())


def called_module(model: nn.Module) -> nn.Module:
    """Return the module on which to set hooks: inside DistributedDataParallel, but around what `torch.compile` has made."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


class Calls:
    """Tells of each call of a model, while it is entered.

    Args:
        model: the model; None: every module with parameters that is not called by another module.
        called: called with the module and its arguments.
    """

    def __init__(self, model: nn.Module | None, called: Callable[[nn.Module, Any, Any], None]) -> None:
        self._model = model
        self._called = called
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Calls:
        if self._model is not None:
            hook = _Hook(self._model, self._called)
            self._handle = self._model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        else:
            self._handle = register_module_forward_pre_hook(self._any)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _any(self, module: nn.Module, args: Any) -> None:
        """Pass on the call of a module that no other module has called."""
        if next(module.parameters(), None) is None:
            return
        kwargs: Any = {}
        frame: Any = sys._getframe(1)
        own = True
        while frame is not None:
            if frame.f_code in CALLS:
                if frame.f_locals["self"] is not module:
                    return
                kwargs = frame.f_locals.get("kwargs", {}) if own else kwargs
                own = False
            frame = frame.f_back
        self._called(module, args, kwargs)
