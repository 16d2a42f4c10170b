"""Patches of torch, for the few places that have no hook.

A patch replaces one attribute of torch while it has at least one listener, and restores the original when the last one leaves.
If other code has patched the same attribute on top of it, it stays and only passes calls through.

* `BACKWARD` (`torch.autograd.backward`): the loss, and the end of a backward.
* `SCALER` (`torch.amp.GradScaler.step`): the loss scale, and steps that the scaler leaves out.
* `UNSCALE` (`torch.amp.GradScaler.unscale_`): the moment from which gradients no longer have the loss scale in them.
* `USER_NORM` and `USER_SCALE` (`torch.nn.utils.clip_grad._get_total_norm`, `_clip_grads_with_norm_`): the two halves of
  the user's `clip_grad_norm_`, so that the norm need not be computed twice.
* `USER_CLIP` (`torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype`): gradients before the user's own
  `clip_grad_norm_`, `clip_grads_with_norm_` or `clip_grad_value_`, all of which call it, whenever they were imported.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.utils.clip_grad as torch_clip

from gradwatch import device
from gradwatch.probe.backwards import losses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.probe.coming import Loss
    from gradwatch.records import Clipped

    Function = Callable[..., Any]

_log = logging.getLogger("gradwatch")


class Fallible(Protocol):
    """What every listener has."""

    def failed(self, error: Exception) -> None:
        """Handle an error that a call of this listener raised; raise it only if it is meant for the training loop."""


class Listener(Fallible, Protocol):
    """The methods that patches call, by way of `tell`."""

    def backward_begins(self, run: Run) -> None:
        """Called before a backward."""

    def backward_failed(self) -> None:
        """Called after a backward that raised."""

    def backward_ended(self, run: Run) -> None:
        """Called after a backward that did not raise."""

    def user_clips(self, gradients: Sequence[Tensor]) -> None:
        """Called before the user clips these gradients."""

    def user_norms(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """Return the L2 norm of these gradients as one vector, exactly as torch computes it; None to let torch compute it."""

    def user_clips_nothing(self, parameters: Sequence[Tensor]) -> None:
        """Called with parameters that the user has clipped although none of them has a gradient."""

    def user_scales(self, total: Tensor, max_norm: float) -> None:
        """Called after the user has clipped gradients whose norm was ``total`` to ``max_norm``."""

    def scaler_unscales(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Called before a gradient scaler divides the gradients of this optimizer by the loss scale."""

    def scaler_steps(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Called before a gradient scaler steps this optimizer."""

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """Called after a gradient scaler has stepped this optimizer, or left the step out because gradients overflowed."""


def tell(listeners: Iterable[Any], call: str, *args: Any) -> list[Any]:
    """Call the method ``call`` of each listener; return the results, None for a listener that failed.

    All listeners are called even if one of them fails. An error is raised afterwards, and only if its listener lets it out.
    """
    answers: list[Any] = []
    meant = None
    for listener in listeners:
        try:
            answers.append(getattr(listener, call)(*args))
        except Exception as error:
            answers.append(None)
            meant = let_out(listener, error) or meant
    if meant is not None:
        raise meant
    return answers


def let_out(listener: Fallible, error: Exception) -> Exception | None:
    """Return the error if its listener means it for the training loop, else None."""
    try:
        listener.failed(error)
    except Exception as raised:
        if raised is error:
            return error
        with suppress(Exception):  # a logging handler of the program may raise
            _log.exception("gradwatch: an error could not be handled; training goes on.", exc_info=error)
    return None


class Run:
    """One backward under way.

    Attributes:
        roots: tensors from which it was started.
        thread: identifier of the thread that started it.
        inside: True if another backward was under way when it began.
        notes: what listeners keep from its beginning to its end.
    """

    __slots__ = ("_losses", "inside", "notes", "roots", "thread")

    def __init__(self, roots: Any, thread: int) -> None:
        self.roots = roots
        self.thread = thread
        self.inside = bool(_under_way)
        self.notes: dict[int, Any] = {}
        self._losses: list[Loss] | None = None

    @property
    def losses(self) -> list[Loss]:
        """The losses from which it was started, read once."""
        if self._losses is None:
            self._losses = losses_of(self.roots)
        return self._losses


_under_way: list[Run] = []  # of all threads

# Autograd writes gradients without holding the GIL, so a gradient that another thread may be writing must not even be read.
# Code that reads gradients when a backward begins or ends adds its thread to `READERS` before it checks `CALLERS`.
CALLERS: set[int] = set()  # threads that call backward
READERS: list[int] = []  # threads that are reading gradients


@contextmanager
def reading(thread: int) -> Iterator[None]:
    """Enter ``thread`` in `READERS` while gradients are read."""
    READERS.append(thread)
    try:
        yield
    finally:
        READERS.remove(thread)


def _called_by(thread: int) -> None:
    """Add a thread that is about to call backward to `CALLERS`, remove ended ones, and wait for readers on other threads."""
    CALLERS.add(thread)
    CALLERS.intersection_update([one.ident for one in threading.enumerate()])
    # they may have checked `CALLERS` before this one was added
    while any(reader != thread for reader in tuple(READERS)):
        time.sleep(0)


class Patch:
    """The replacement of one attribute of torch, made by ``wrap(original, patch)``."""

    def __init__(self, name: str, owner: Any, attribute: str, wrap: Callable[[Function, Patch], Function]) -> None:
        self.name = name
        self._owner = owner
        self._attribute = attribute
        self._wrap = wrap
        self._original: Function | None = None
        self._replacement: Function | None = None
        self._lock = threading.RLock()  # the collector may end an old monitor right in here
        self._listeners: tuple[weakref.ref[Any], ...] = ()  # a WeakSet costs two microseconds to walk

    @property
    def installed(self) -> bool:
        """True while the attribute of torch is the replacement."""
        return self._replacement is not None and getattr(self._owner, self._attribute) is self._replacement

    @property
    def listeners(self) -> list[Any]:
        """The listeners to call; none while a CUDA graph is captured, when no device work may be started or awaited."""
        if device.capturing():
            return []
        return [listener for ref in self._listeners if (listener := ref()) is not None]

    def add(self, listener: Fallible) -> bool:
        """Add a listener; return False if this version of torch does not have the attribute."""
        with self._lock:
            if not hasattr(self._owner, self._attribute):
                return False
            self._listeners += (weakref.ref(listener),)
            if not self.installed:
                self._original = getattr(self._owner, self._attribute)
                # in a compiled region Dynamo breaks its graph here instead of tracing into the monitor
                self._replacement = torch.compiler.disable(self._wrap(self._original, self))
                setattr(self._owner, self._attribute, self._replacement)
            return True

    def remove(self, listener: Fallible) -> None:
        """Remove a listener; without listeners the original attribute is restored."""
        with self._lock:
            self._listeners = tuple(ref for ref in self._listeners if ref() not in (None, listener))
            if not self._listeners and self.installed:
                setattr(self._owner, self._attribute, self._original)
                self._replacement = self._original = None


def _wrap_backward(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        # reentrant checkpointing calls backward inside a backward, on a device from a thread of autograd
        if torch._C._current_graph_task_id() != -1:
            return original(tensors, *args, **kwargs)
        if (me := threading.get_ident()) not in CALLERS or len(CALLERS) > 1:
            _called_by(me)
        listeners, run = patch.listeners, Run(tensors, me)
        tell(listeners, "backward_begins", run)
        _under_way.append(run)
        try:
            result = original(tensors, *args, **kwargs)
        except BaseException:
            run.notes.clear()  # the traceback may be kept, and keeps this frame alive
            tell(listeners, "backward_failed")
            raise
        finally:
            _under_way.remove(run)
        tell(listeners, "backward_ended", run)
        return result

    return backward


def _wrap_grouping(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def grouping(lists: Sequence[Sequence[Tensor]], *args: Any, **kwargs: Any) -> Any:
        tell(patch.listeners, "user_clips", lists[0])
        return original(lists, *args, **kwargs)

    return grouping


def _wrap_total_norm(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def total_norm(tensors: Any, norm_type: float = 2.0, strict: Any = False, foreach: bool | None = None) -> Any:  # noqa: FBT001, FBT002
        if norm_type == 2.0 and not strict and foreach is not False and isinstance(tensors, list):
            total = next((one for one in tell(patch.listeners, "user_norms", tensors) if one is not None), None)
            if total is not None:
                return total
        return original(tensors, norm_type, strict, foreach)

    return total_norm


def _wrap_scaling(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def scaling(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(parameters, max_norm, total_norm, *args, **kwargs)
        tell(patch.listeners, "user_scales", total_norm, max_norm)
        if type(parameters) is list and all(one.grad is None for one in parameters):  # the first one has one, as a rule
            tell(patch.listeners, "user_clips_nothing", parameters)
        return result

    return scaling


def _wrap_scaler_step(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def step(scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        listeners = patch.listeners
        tell(listeners, "scaler_steps", scaler, optimizer)
        result = original(scaler, optimizer, *args, **kwargs)
        tell(listeners, "scaler_stepped", optimizer)
        return result

    return step


def _wrap_unscaling(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def unscale_(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        tell(patch.listeners, "scaler_unscales", scaler, optimizer)
        original(scaler, optimizer)

    return unscale_


BACKWARD = Patch("backward", torch.autograd, "backward", _wrap_backward)
SCALER = Patch("scaler", torch.amp.GradScaler, "step", _wrap_scaler_step)
UNSCALE = Patch("unscaling", torch.amp.GradScaler, "unscale_", _wrap_unscaling)
USER_CLIP = Patch("user's clip", torch_clip, "_group_tensors_by_device_and_dtype", _wrap_grouping)
USER_NORM = Patch("user's norm", torch_clip, "_get_total_norm", _wrap_total_norm)
USER_SCALE = Patch("user's scaling", torch_clip, "_clip_grads_with_norm_", _wrap_scaling)
ALL = (BACKWARD, SCALER, UNSCALE, USER_CLIP, USER_NORM, USER_SCALE)


def clip_seen(*, before: bool) -> Clipped:
    """Return what is known of the user's own clip; ``before`` is True if norms were measured before one."""
    if before:
        return "before the user's clip"
    return "no clip before it seen" if USER_CLIP.installed else "as the optimizer sees it"
