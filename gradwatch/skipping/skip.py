"""How one optimizer's step is left out, so that parameters and state stay as they were to the bit.

The classes of `torch.optim` take a parameter that has no gradient for one that is not part of the step: hiding the gradients is
enough, and tests hold that for each of them; LBFGS counts its evaluations all the same, which is undone. Others may take a
gradient for granted, take None for zero, evaluate a closure again, or keep gradients elsewhere. Their step runs with zeros
instead, and all that it moved is put back.

A step with a closure can only be left out once that has been evaluated, and one that leaves the work to another optimizer
when that is about to step. What a class of optimizers changes before is learned from its first step, and kept from then on
before each step: copies of its tensors where it moves them, the numbers that it counts, or nothing. A class that begins later to
change anything is found out in the step that must be left out; that one is not called skipped.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from gradwatch.errors import words_of
from gradwatch.measure.wrappers import is_dtensor
from gradwatch.skipping.around import Around, around
from gradwatch.skipping.snapshot import Snapshot, Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    Told = Callable[[str], None]
    Changes = Literal["tensors", "counts", "nothing"]

# what the steps of a class change before they evaluate their closure: tensors, as sharpness-aware ones do, or what they count
_changes_first: weakref.WeakKeyDictionary[type, Changes] = weakref.WeakKeyDictionary()
_NUMBERS = (int, float, bool)
_CHANGED_FIRST = "its step had changed what it holds before its gradients were seen"


class Zeroed(Protocol):
    """A gradient that is zero for a while."""

    def put_back(self) -> None:
        """End that."""


class Skip:
    """What leaves out the steps of one optimizer.

    `leave_out` before a step, or `leave_out_inside` in the middle of one, of which `expect` was told before. ``told`` is called
    when it is known whether the step was left out: with nothing, or with why not. Nothing here raises.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._around: Around | None = None
        self._told: Told | None = None
        self._snapshot: Snapshot | None = None
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._zeroed: list[Zeroed] = []
        self._reason = ""
        self._versions = -1
        self._counts: list[Any] = []

    @property
    def busy(self) -> bool:
        """True while a step is being left out."""
        return self._told is not None

    def leave_out(self, told: Told) -> None:
        """Leave out the step that is about to be made."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._told, self._reason = told, ""
        begin = self._hide if is_torchs(optimizer) else self._begin
        self._around = around(optimizer, begin, self.end)
        if self._around is None:  # `end` comes with the hook after the step
            begin()

    def expect(self) -> None:
        """A step is about to be made that may have to be left out in the middle of it.

        That is where its closure has been evaluated, or where another optimizer is about to step for it.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if is_torchs(optimizer) and not isinstance(optimizer, torch.optim.LBFGS):
            return
        if self._around is not None and self._around.under_way:  # the step of its base class
            return
        self._around = around(optimizer, self._before, self.end)
        if self._around is None:
            self._before()

    def _before(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._reason = ""
        self._versions = _versions(optimizer)
        changes: Changes = "counts" if is_torchs(optimizer) else _changes_first.get(type(optimizer), "tensors")
        self._counts = _counts(optimizer) if changes == "nothing" else []
        if changes != "nothing":
            self._keep(optimizer, tensors=changes == "tensors")

    def leave_out_inside(self, told: Told) -> None:
        """Leave out the rest of a step that was expected and has begun, and undo what it did before."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._told = told
        if is_torchs(optimizer):  # which evaluate first, and once; LBFGS ends where the gradient is zero
            self._hide()
            return
        self._learn(optimizer)
        if self._snapshot is not None:
            self._complete(optimizer, self._snapshot)
        else:
            if _changes_first[type(optimizer)] != "nothing":
                self._reason = _CHANGED_FIRST
            self._keep(optimizer)
        self._zero()

    @torch.no_grad()
    def _complete(self, optimizer: Optimizer, snapshot: Snapshot) -> None:
        """Copy the tensors that were not copied before the step."""
        try:
            if not snapshot.keep_tensors():
                _changes_first[type(optimizer)] = "tensors"
                self._reason = _CHANGED_FIRST
        except Exception as error:
            self._reason = f"what it holds cannot be copied: {words_of(error)}"

    def evaluated(self, *, first: bool) -> None:
        """The middle of an expected step is over: in one that is being left out, later gradients are not for use either."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._told is None and first:
            if not is_torchs(optimizer):
                self._learn(optimizer)
            self._snapshot = None
        elif self._told is not None and not first:
            if is_torchs(optimizer):
                self._hide()
            else:
                self._zero()

    def _learn(self, optimizer: Optimizer) -> None:
        kind, snapshot = type(optimizer), self._snapshot
        known = _changes_first.get(kind)
        if known == "tensors":
            return
        if _versions(optimizer) != self._versions or (snapshot is not None and snapshot.moved()):
            _changes_first[kind] = "tensors"
        elif known != "counts":
            counted = known is not None and _counts(optimizer) != self._counts
            counted = snapshot.counted() if snapshot is not None else counted
            _changes_first[kind] = "counts" if counted else "nothing"

    def _begin(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and self._told is not None:
            self._keep(optimizer)
            self._zero()

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, *, tensors: bool = True) -> None:
        try:
            self._snapshot = Snapshot(optimizer, self._model(), tensors=tensors)
        except Unreadable as finding:
            self._reason = str(finding)
        except Exception as error:  # what a user's class holds may do anything when it is looked at
            self._reason = f"what it holds cannot be kept: {words_of(error)}"

    def _hide(self) -> None:
        optimizer = self._optimizer()
        for parameter in _parameters(optimizer) if optimizer is not None and self._told is not None else ():
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def _zero(self) -> None:
        optimizer = self._optimizer()
        self._zeroed = []
        for parameter in _parameters(optimizer) if optimizer is not None else ():
            try:
                if parameter.grad is not None:
                    self._zeroed.append(_zeroed(parameter))
            except (RuntimeError, NotImplementedError) as error:  # it keeps what it has
                self._reason = f"a gradient could not be made zero: {words_of(error)}"

    def end(self, *, late: bool = False) -> None:
        """Put everything back; ``late``: the step raised some time ago, so that its user may have gone on already.

        The hook after a step comes too early where a step calls that of its base class. What failed at the end of a step
        is raised here, where it does not reach the training.
        """
        around = self._around
        if around is not None and around.under_way:
            return
        if self._told is not None or around is not None:
            self._end(late=late)
        if around is not None and around.end_error is not None:
            raise around.end_error

    @torch.no_grad()
    def _end(self, *, late: bool) -> None:
        around = self._around
        if around is not None and around.begin_error is not None:
            self._reason = words_of(around.begin_error)
        told, self._told = self._told, None
        snapshot, self._snapshot = self._snapshot, None
        hidden, self._hidden = self._hidden, []
        zeroed, self._zeroed = self._zeroed, []
        try:
            for parameter, gradient in () if late else hidden:
                if parameter.grad is None:
                    parameter.grad = gradient
            if snapshot is not None and told is not None and not late:
                self._reason = snapshot.put_back() or self._reason
            for one in zeroed:
                one.put_back()
        except Exception as error:
            self._reason = f"what it held could not be put back: {words_of(error)}"
        if told is not None:
            told("its step raised" if late else self._reason)
        if around is not None:  # last: while it is there, a failure on the way here can be found on it
            around.remove()
            self._around = None


class _InPlace:
    """A gradient that is zeros itself: whoever keeps another view of its memory sees them too.

    They are negative zeros, so that those of an optimizer that clears its gradients can be told from them.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._parameter, self._gradient = parameter, parameter.grad
        self._copy = parameter.grad.clone()
        parameter.grad.fill_(-0.0)

    def put_back(self) -> None:
        cleared = self._parameter.grad is self._gradient and not torch.signbit(_real(self._gradient)).any()
        if cleared and not self._gradient.any() and self._gradient.numel():
            return
        self._gradient.copy_(self._copy)
        if self._parameter.grad is not None:
            self._parameter.grad = self._gradient


class _StoodIn:
    """A gradient in whose place zeros stand."""

    def __init__(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._parameter, self._gradient = parameter, parameter.grad
        parameter.grad = torch.zeros_like(parameter.grad)

    def put_back(self) -> None:
        if self._parameter.grad is not None:
            self._parameter.grad = self._gradient


def _zeroed(parameter: nn.Parameter) -> Zeroed:
    gradient = parameter.grad
    assert gradient is not None
    strided = gradient.layout is torch.strided and not is_dtensor(gradient) and not gradient.requires_grad
    # one whose elements share memory cannot be written to
    plain = strided and (gradient.is_contiguous() or torch.empty_like(gradient).stride() == gradient.stride())
    return _InPlace(parameter) if plain else _StoodIn(parameter)


def _versions(optimizer: Optimizer) -> int:
    return sum(parameter._version for parameter in _parameters(optimizer) if not parameter.is_inference())


def _counts(optimizer: Optimizer) -> list[Any]:
    """Return the numbers that an optimizer counts in: among its attributes, its groups and the state of each parameter."""
    held = [vars(optimizer), *optimizer.param_groups, *optimizer.state.values()]
    return [value for one in held if isinstance(one, dict) for value in one.values() if type(value) in _NUMBERS]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def is_torchs(optimizer: Optimizer) -> bool:
    """True for a class of `torch.optim` whose step is still torch's own."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return False
    step: Any = kind.step
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch."):
            return False
        step = getattr(step, "__wrapped__", None)
    return True
