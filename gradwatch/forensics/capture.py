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

from gradwatch.forensics.callers import Lasting
from gradwatch.forensics.frames import CALLS, line_of
from gradwatch.forensics.names import tensors_in
from gradwatch.forensics.ops import next_node

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from gradwatch.forensics.callers import Caller
    from gradwatch.records import OwnTime

_MOST = 16  # forwards of one step
_LARGEST = 16 * 2**20  # bytes of an output that is kept; a larger one is kept only as long as the program keeps it


class Call:
    """One forward of a model, or of a part of a model that is not called itself.

    Attributes:
        module: what was called.
        args, kwargs: arguments.
        versions: numbers of in-place changes of the tensors among the positional arguments.
        generator: state of the CPU's generator before the forward.
        autocast: whether autocast was on, and its dtype, for the device of the call.
        file, line, code: where the program called the model.
        callers: functions that had called it and have ended since, the innermost first.
        backward: whether a backward of this forward has begun.
        started: when it began, in seconds of `time.perf_counter`.
        first, last: numbers that autograd gave next, before and after it: its nodes have those from the first to before the last.
    """

    __slots__ = (
        "_large",
        "_output",
        "args",
        "autocast",
        "backward",
        "callers",
        "code",
        "file",
        "first",
        "generator",
        "kwargs",
        "last",
        "line",
        "module",
        "started",
        "versions",
    )

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.started = perf_counter()
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.versions = [one._version for one in args if type(one) is torch.Tensor and not one.is_inference()]
        self.generator = torch.default_generator.get_state()
        self.autocast = (
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
            if torch.is_autocast_enabled("cpu")
            else None
        )
        self.file, self.line = "", 0
        self.code: CodeType | None = None
        self.callers: tuple[Caller, ...] = ()
        self._output: Any = None
        self._large: Any = None
        self.backward = False
        self.first = self.last = next_node()

    def made(self, number: int) -> bool:
        """Return whether a node of autograd with this number was made by the forward."""
        return self.first <= number < self.last

    def called_from(self, depth: int, lasting: Lasting) -> None:
        """Remember which line of the program has made the call, and the functions that it stands in."""
        file, line, frame = line_of(sys._getframe(depth + 1))
        self.file, self.line, self.code = file, line, frame.f_code if frame is not None else None
        if self.code is not lasting.latest:  # as in the loop of most programs
            self.callers = lasting.callers(frame)

    def leave(self, frame: FrameType | None, lasting: Lasting) -> None:
        """Forget those functions that have not ended, given the frame in which backward is called."""
        self.callers = lasting.ended(self.callers, frame)

    def gave(self, output: Any) -> None:
        """Remember the output; a large tensor only weakly."""
        self.last = next_node()
        if type(output) is torch.Tensor:
            if output.element_size() * output.numel() > _LARGEST:
                self._large = weakref.ref(output)
            else:
                self._output = output
        elif sum(one.element_size() * one.numel() for _, one in outputs_in(output)) <= _LARGEST:
            self._output = output

    @property
    def output(self) -> Any:
        """What the model returned; None if that is gone."""
        return self._large() if self._large is not None else self._output

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that the model returned, as far as they are still there."""
        output = self.output
        return [output] if type(output) is torch.Tensor else [one for _, one in outputs_in(output)]

    def begin_backward(self) -> None:
        """Record that a backward of this forward begins."""
        self.backward = True

    def without_output(self) -> Call:
        """Drop the output, which keeps the graph alive, and return the call."""
        self._output = self._large = None
        self.callers = ()
        return self

    @property
    def changed(self) -> bool:
        """Whether an input was changed in place since the forward."""
        now = [one._version for one in self.args if type(one) is torch.Tensor and not one.is_inference()]
        return now != self.versions


def outputs_in(output: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors in the output of a model: in lists, tuples, dicts and dataclasses."""
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, dict):
        output = {name: getattr(output, name, None) for name in output.__dataclass_fields__}
    return list(tensors_in(output))


class _Hook:
    """A hook of a module. Copies and pickles of the module hold one in its place that does nothing.

    Args:
        model: the module, held weakly, since its copies call the same hooks.
        call: bound method to call with the module and the arguments of the hook; its object is held weakly.
    """

    def __init__(self, model: nn.Module, call: Callable[..., None]) -> None:
        self._model = weakref.ref(model)
        self._call = weakref.WeakMethod(call)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Pass on the call of a module; nothing while it is compiled."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and module is self._model() and (call := self._call()) is not None:
            call(module, *args)

    def __reduce__(self) -> Any:
        """Become a function that takes anything and does nothing, which can be read without gradwatch."""
        return getattr, (nullcontext(), "__exit__")


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

    def backward_begins(self) -> None:
        """Capture the calls of the parts of a model from now on, if a backward has come without a call of the model."""
        model = self._model()
        if self._by_parts is None and self._handles and model is not None:
            self._by_parts = True
            self._watch_parts(model)

    def _watch(self, module: nn.Module) -> None:
        self._handles += [
            module.register_forward_pre_hook(_Hook(module, self._begins), prepend=True, with_kwargs=True),
            module.register_forward_hook(_Hook(module, self._ends), with_kwargs=True),
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
        try:
            if len(self.calls) >= _MOST:
                del self.calls[0]
            call = Call(module, args, kwargs)
            call.called_from(3, self.lasting)
            self.calls.append(call)
            self._begun(module, args, kwargs)
            self._own_time.seconds += perf_counter() - call.started
        except Exception as error:  # without it, less is known
            self.calls.clear()
            self._failed(error)

    def _ends(self, module: nn.Module, _: Any, __: Any, output: Any) -> None:
        if module is not self._open:
            return
        self._open = None
        if self.on and self.calls:
            started = perf_counter()
            try:
                self.calls[-1].gave(output)
                self._own_time.seconds += perf_counter() - started
            except Exception as error:
                self.calls.clear()
                self._failed(error)


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
