"""`find_nonfinite`: watches every operation of a block of code and raises at the first number that is not finite."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from gradwatch.errors import NonFiniteError, UsageError, shown
from gradwatch.forensics.capture import Calls, called_module
from gradwatch.forensics.explain import lines_of, origin_of, sole
from gradwatch.forensics.marks import ordered
from gradwatch.forensics.names import Names
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.replay import batch_of
from gradwatch.forensics.standins import eagerly
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped
from gradwatch.probe import BACKWARD, listen, unlisten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.forensics.marks import Mark


class Watch:
    """Watches each operation while `running` is entered, and raises `NonFiniteError` at the first finding.

    Args:
        model: the model; None if it is not known, so that every model of the process is watched.

    Attributes:
        finding: the first finding; None so far.
        steps: number of optimizer steps so far.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = unwrapped(model) if model is not None else None
        self._names = Names(model)
        self._trace = Trace(self._names)
        self._calls = Calls(called_module(model) if model is not None else None, self._called)
        self.finding: NonFiniteError | None = None
        self.steps = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs."""
        me: Any = self  # of the methods of a listener it has those that these two call
        with ExitStack() as stack:
            BACKWARD.add(me)
            stack.callback(BACKWARD.remove, me)
            listen(me)
            stack.callback(unlisten, me)
            stack.enter_context(self._calls)
            stack.enter_context(eagerly())
            stack.enter_context(self._trace)
            yield
            self._check_model()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Remember the inputs of a model."""
        self._trace.of_batch(batch_of(args, kwargs))
        self._names.add_inputs(unwrapped(module), args, kwargs)

    # Called by the patch of `torch.autograd.backward` and by the optimizer's hooks.

    def failed(self, error: Exception) -> None:
        """Let the finding out, and errors of the watching too: nothing else was asked for."""
        raise error

    def captured(self) -> None:
        """A step inside a CUDA graph runs no code here."""

    def backward_begins(self, run: Any) -> None:
        """Check the loss."""
        roots = run.roots if isinstance(run.roots, (list, tuple)) else (run.roots,)
        self._check([one for one in roots if isinstance(one, torch.Tensor)], "the loss")

    def backward_failed(self) -> None:
        """Nothing is kept of a backward."""

    def backward_ended(self, _: Any) -> None:
        """Check the gradients if the model is known; otherwise they are checked before a step, which a scaler may leave out."""
        if self._model is not None:
            self._check(_gradients_of(self._model.parameters()), "a gradient")

    def before_step(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        """Check the gradients."""
        self._check(_gradients_of(_parameters_of(optimizer)), "a gradient")
        self._trace.updates(on=True)

    def after_step(self, optimizer: Optimizer) -> None:
        """Check the weights."""
        self._trace.updates(on=False)
        self.steps += 1
        self._check(_parameters_of(optimizer), "a weight")

    def _check_model(self) -> None:
        if self._model is not None:
            self._check(_gradients_of(self._model.parameters()), "a gradient")
            self._check(self._model.parameters(), "a weight")

    def _check(self, tensors: Iterable[Tensor], what: str) -> None:
        with _disable_current_modes():
            bad = [one for one in tensors if is_nonfinite(one)]
            if not bad:
                return
            if self._trace.failed is not None:
                raise self._trace.failed
            error = _error(marks_in(self._trace, bad), what, self._trace.batch)
            self.finding = self.finding or error
            raise error


def _gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [one.grad for one in parameters if one.grad is not None and not one.grad.is_sparse]


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _error(marks: Sequence[Mark], what: str, batch: int) -> NonFiniteError:
    mark = sole(marks)
    if mark is None:
        known = [str(origin_of(one, "watched step")) for one in ordered(marks)]
        listed = "".join(f"\n  {line}" for line in known)
        return NonFiniteError(f"{what} is not finite; it has several origins, and which counts is not known:{listed}")
    origin = origin_of(mark, "watched step", batch=batch)
    return NonFiniteError("\n".join([f"{what} is not finite: {lines_of(origin)[0]}", *lines_of(origin)[1:]]), origin)


@contextmanager
def find_nonfinite(model: nn.Module) -> Iterator[None]:
    """Watch each operation in the block, and raise `NonFiniteError` with the operation that made the first number that counts.

    The loss is checked when a backward begins, gradients when it ends and before each step, weights after each step, and both at
    the end of the block. Gradients that a `GradScaler` makes overflow count: give it a scale that holds, or use `gradwatch
    blame`. Only what reaches one of these counts: infinities of a mask, and a branch that `torch.where` drops, do not. A watched
    step takes 1.4 to 5 times as long as a plain one, and compiled code runs as it is written.

    >>> import torch, gradwatch
    >>> model = torch.nn.Linear(2, 1)
    >>> with gradwatch.find_nonfinite(model):
    ...     (model(torch.zeros(3, 2)) * 0).log().mean().backward()
    Traceback (most recent call last):
    ...
    gradwatch.errors.NonFiniteError: ...

    Raises:
        NonFiniteError: a loss, gradient or weight is not finite. Its ``origin`` is the `gradwatch.Origin`.
        UsageError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"find_nonfinite() got {shown(model)}; expected a torch.nn.Module.")
    with Watch(model).running():
        yield
