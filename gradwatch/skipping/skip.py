"""Leaving out the step of one optimizer, so that parameters and optimizer state stay bit-identical.

The classes of `torch.optim` ignore parameters without a gradient, so hiding the gradients is enough; tests verify this for each
of them. Other classes may require a gradient, treat None as zero, evaluate a closure again, or keep gradients elsewhere. Their
step runs with gradients of zero, and everything that it changed is restored.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

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

# whether the step of a class moves parameters before it evaluates its closure, as sharpness-aware optimizers do
_moves_first: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


class Zeroed(Protocol):
    """A gradient that is temporarily zero."""

    def put_back(self) -> None:
        """Restore the gradient."""


class Skip:
    """Leaves out steps of one optimizer.

    Call `leave_out` before a step. For a step with a closure, call `expect_closure` before the step and `leave_out_inside`
    after the first evaluation of the closure. ``told`` is called when it is known whether the step was left out: with an
    empty string, or with the reason why it was not. Only `end` may raise, where it does not reach the training.
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

    def leave_out_rest(self, told: Told) -> None:
        """Leave out the rest of a step that has begun, inside which another optimizer is about to step."""
        self._told, self._reason = told, ""
        self._begin()

    def expect_closure(self) -> None:
        """Prepare for a step with a closure, which may have to be left out once its closure has been evaluated."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if is_torchs(optimizer):
            return
        self._around = around(optimizer, self._before_closure, self.end)
        if self._around is None:
            self._before_closure()

    def _before_closure(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._reason = ""
        self._versions = _versions(optimizer)
        if _moves_first.get(type(optimizer), True):  # unknown before the first step
            self._keep(optimizer)

    def leave_out_inside(self, told: Told) -> None:
        """Leave out the rest of a step whose closure was evaluated for the first time, and undo what it did before."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self._told = told
        if is_torchs(optimizer):  # they evaluate the closure first and once; LBFGS stops if the gradient is zero
            self._hide()
            return
        self._learn(optimizer)
        if self._snapshot is None:
            if _moves_first[type(optimizer)]:
                self._reason = "the optimizer had changed parameters before it evaluated its closure"
            self._keep(optimizer)
        self._zero()

    def evaluated(self, *, first: bool) -> None:
        """Handle an evaluation of the closure: in a step that is being left out, later gradients are not used either."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._told is None and first and not is_torchs(optimizer):
            self._learn(optimizer)
            self._snapshot = None
        elif self._told is not None and not first:
            if is_torchs(optimizer):
                self._hide()
            else:
                self._zero()

    def _learn(self, optimizer: Optimizer) -> None:
        kind = type(optimizer)
        moved = _versions(optimizer) != self._versions
        if kind not in _moves_first:
            _moves_first[kind] = moved or (self._snapshot is not None and self._snapshot.moved())
        elif moved:
            _moves_first[kind] = True

    def _begin(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and self._told is not None:
            self._keep(optimizer)
            self._zero()

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer) -> None:
        try:
            self._snapshot = Snapshot(optimizer, self._model())
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
