"""Leaving out the step of one optimizer, so that parameters and optimizer state stay bit-identical.

The classes of `torch.optim` ignore parameters without a gradient, so hiding the gradients is enough; tests verify this for each
of them. LBFGS counts its evaluations nevertheless, which is undone. Other classes may require a gradient, treat None as zero,
evaluate a closure again, or keep gradients elsewhere. Their step runs with gradients of zero, and everything that it changed is
restored.

A step with a closure can only be left out after the closure was evaluated, and a step that delegates to another optimizer when
that one is about to step. What a class of optimizers changes before that is learned from its first step, and copied from then
on before each step: its tensors, the numbers that it counts, or nothing. A class that begins later to change something is
detected in the step that should be left out; that step is not counted as skipped.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from gradwatch.errors import words_of
from gradwatch.measure.wrappers import is_dtensor
from gradwatch.skipping.around import Around, around
from gradwatch.skipping.optimizer_copy import OptimizerCopy, Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    Told = Callable[[str], None]
    Changes = Literal["tensors", "counts", "nothing"]

# what the step of a class changes before it evaluates its closure: tensors, as sharpness-aware optimizers do, or counters
_changes_first: weakref.WeakKeyDictionary[type, Changes] = weakref.WeakKeyDictionary()
_NUMBERS = (int, float, bool)
_CHANGED_FIRST = "the step had changed the optimizer before its gradients were measured"


class Zeroed(Protocol):
    """A gradient that is temporarily zero."""

    def put_back(self) -> None:
        """Restore the gradient."""


class Skip:
    """Leaves out steps of one optimizer.

    Call `leave_out` before a step. For a step that can only be left out in the middle, call `expect` before the step and
    `leave_out_inside` after the first evaluation of its closure, or before the step of the optimizer that it delegates to.
    ``told`` is called when it is known whether the step was left out: with an empty string, or with the reason why it was not.
    Only `end` may raise, where it does not reach the training.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._around: Around | None = None
        self._told: Told | None = None
        self._copy: OptimizerCopy | None = None
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
        if self._around is None:  # the hook after the step calls `end`
            begin()

    def expect(self) -> None:
        """Prepare for a step that may have to be left out in the middle.

        That is after its closure was evaluated, or when another optimizer is about to step for it.
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
        """Leave out the rest of an expected step that has begun, and undo what it did before."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._told = told
        if is_torchs(optimizer):  # they evaluate the closure first and once; LBFGS stops if the gradient is zero
            self._hide()
            return
        self._learn(optimizer)
        if self._copy is not None:
            self._complete(optimizer, self._copy)
        else:
            if _changes_first[type(optimizer)] != "nothing":
                self._reason = _CHANGED_FIRST
            self._keep(optimizer)
        self._zero()

    @torch.no_grad()
    def _complete(self, optimizer: Optimizer, copy: OptimizerCopy) -> None:
        """Copy the tensors that were not copied before the step."""
        try:
            if not copy.keep_tensors():
                _changes_first[type(optimizer)] = "tensors"
                self._reason = _CHANGED_FIRST
        except Exception as error:
            self._reason = f"what it holds cannot be copied: {words_of(error)}"

    def evaluated(self, *, first: bool) -> None:
        """Handle the middle of an expected step: in one that is being left out, later gradients are not used either."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._told is None and first:
            if not is_torchs(optimizer):
                self._learn(optimizer)
            self._copy = None
        elif self._told is not None and not first:
            if is_torchs(optimizer):
                self._hide()
            else:
                self._zero()

    def _learn(self, optimizer: Optimizer) -> None:
        kind, copy = type(optimizer), self._copy
        known = _changes_first.get(kind)
        if known == "tensors":
            return
        if _versions(optimizer) != self._versions or (copy is not None and copy.moved()):
            _changes_first[kind] = "tensors"
        elif known != "counts":
            counted = known is not None and _counts(optimizer) != self._counts
            counted = copy.counted() if copy is not None else counted
            _changes_first[kind] = "counts" if counted else "nothing"

    def _begin(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and self._told is not None:
            self._keep(optimizer)
            self._zero()

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, *, tensors: bool = True) -> None:
        try:
            self._copy = OptimizerCopy(optimizer, self._model(), tensors=tensors)
        except Unreadable as finding:
            self._reason = str(finding)
        except Exception as error:  # objects of a user's class may raise anything when they are inspected
            self._reason = f"the contents of the optimizer cannot be copied: {words_of(error)}"

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
            except (RuntimeError, NotImplementedError) as error:  # this gradient keeps its value
                self._reason = f"a gradient could not be set to zero: {words_of(error)}"

    def end(self, *, late: bool = False) -> None:
        """Restore everything after the step, and raise the exception that restoring raised during the step, if any.

        Nothing is done while the step is still running, since the hook after a step is called too early if the step calls that
        of its base class. If ``late``, the step raised some time ago and the program may have changed gradients and state
        since, so only gradients that were set to zero are restored.
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
        copy, self._copy = self._copy, None
        hidden, self._hidden = self._hidden, []
        zeroed, self._zeroed = self._zeroed, []
        try:
            for parameter, gradient in () if late else hidden:
                if parameter.grad is None:
                    parameter.grad = gradient
            if copy is not None and told is not None and not late:
                self._reason = copy.put_back() or self._reason
            for one in zeroed:
                one.put_back()
        except Exception as error:
            self._reason = f"the contents of the optimizer could not be restored: {words_of(error)}"
        if told is not None:
            told("its step raised" if late else self._reason)
        if around is not None:  # last, because its `end_error` is needed if something above raises
            around.remove()
            self._around = None


class _InPlace:
    """A gradient that is set to zero in place, so that other views of its memory are zero too.

    Negative zeros are used, to distinguish them from those of an optimizer that clears its gradients.
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
    """A gradient that is replaced by a tensor of zeros."""

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
    # tensors whose elements share memory cannot be written to
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
    """Return True for an optimizer of a class in `torch.optim` whose step has not been replaced."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return False
    step: Any = kind.step
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch."):
            return False
        step = getattr(step, "__wrapped__", None)
    return True
