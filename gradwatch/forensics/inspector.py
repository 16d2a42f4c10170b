"""The investigations of one monitor: when to look, with what, how often, and whom to tell."""

from __future__ import annotations

import math
import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from gradwatch import device
from gradwatch.forensics.armed import ArmedSteps, gradients_of
from gradwatch.forensics.capture import Capture, called_module
from gradwatch.forensics.earlier import EarlierSteps
from gradwatch.forensics.findings import Findings
from gradwatch.forensics.frames import line_of
from gradwatch.forensics.investigation import Investigation, NothingFound
from gradwatch.forensics.keep import keep
from gradwatch.forensics.names import tensors_in
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.price import Price
from gradwatch.forensics.sharing import Sharing
from gradwatch.forensics.singular import Singular
from gradwatch.forensics.spread import can_repeat_together, is_spread
from gradwatch.forensics.statements import Backward, backward_at
from gradwatch.forensics.update import update_origin
from gradwatch.measure.deepspeed import engine_of
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.forensics.call import Call
    from gradwatch.forensics.settings import Mode
    from gradwatch.probe import Together
    from gradwatch.records import Origin, OwnTime, Row

_MOST = 3  # investigations of a run
_LARGEST = 16 * 2**20  # bytes of an output whose gradient is kept


class Inspector:
    """Implements `gradwatch.probe.investigator.Investigator`.

    Args:
        model: the model, held weakly.
        mode: how much to do, as `gradwatch.attach` describes it.
        found: called with each finding.
        unknown: called with why an operation was not found.
        note: called with what the user should know.
        failed: called with an error of the capture or of an investigation.
        own_time: counter of the time that watching takes.
        share: share of the training time that it may take; None: that is not limited.

    Attributes:
        watching: whether operations are watched now.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Mode,
        found: Callable[[Origin], None],
        unknown: Callable[[str], None],
        note: Callable[[str], None],
        failed: Callable[[Exception], None],
        own_time: OwnTime,
        share: float | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._mode = mode
        self._findings = Findings(found, unknown, note)
        self._note, self._failed = note, failed
        self._capture = Capture(called_module(model), self._forward_begins, self._capture_failed, own_time)
        self._armed = ArmedSteps()
        self.watching = False
        self._only_armed = False  # whether forwards are captured for watched steps alone
        self._sharing = Sharing()
        self._singular = Singular()
        self._left = _MOST
        self._in_trouble = self._was_in_trouble = False  # whether this step, and the one before, are not finite
        self._unexplained = False  # whether nothing was found in the trouble that lasts
        self._got_finite = False  # whether what its forwards got was finite
        self._price = Price(share) if mode == "auto" else None
        self._step = 0
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._earlier = EarlierSteps()
        self._batch: Any = None
        self._folder: Path | None = None  # for the inputs of a step that failed
        self._backward: Backward | None = None  # where the program has called it

    @property
    def investigations(self) -> int:
        """The number of steps that were investigated."""
        return _MOST - self._left

    def follow(self, model: nn.Module) -> None:
        """Go on with what is left of a model that is gone."""
        self._model = weakref.ref(model)
        self._capture.follow(model)

    def start(self) -> None:
        """Register the hooks on the model."""
        parameter = next((one for model in [self._model()] if model is not None for one in model.parameters()), None)
        on_device = parameter is not None and not device.reading_is_free(parameter.device)
        if not (on_device and self._mode == "auto"):
            self._capture.start()

    def stop(self) -> None:
        """Remove the hooks and drop everything."""
        self._capture.stop()
        self._armed.disarm()
        self._forget()
        self._earlier.forget()

    def given(self, batch: Any) -> None:
        """Remember the batch that the user has named, for the names of its tensors."""
        self._batch = batch

    def keep_in(self, folder: Path) -> None:
        """Write the inputs of a step that fails into this folder."""
        self._folder = folder

    def _capture_failed(self, error: Exception) -> None:
        self.stop()
        self._failed(error)

    def _forget(self) -> None:
        self._capture.forget()
        self._singular.forget()
        self._findings.forget()
        self._batch = self._backward = None

    # What happens in a step.

    def _forward_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.watching or self._armed.steps):  # as in nearly all steps
            return
        model = self._model()
        if model is not None:
            self._armed.forward_begins(model, module, args, kwargs)
            self.watching = self._armed.on

    def backward_begins(self, roots: Any, losses: list[Any]) -> None:
        """Prepare for a backward; find the origin of a loss that is not finite, while its graph is whole."""
        started = perf_counter()
        try:
            every = self._capture.calls
            calls = [call for call in every if not call.backward]
            if every:
                frame = line_of(sys._getframe())[2]
                for call in calls:
                    if call.callers:
                        call.leave(frame, self._capture.lasting)
                self._backward = backward_at(frame, losses, _tensors(roots), calls or list(every))
            else:
                self._capture.backward_begins()
            if not self._are_finite(losses):
                self._in_trouble = True
                self._watched(_tensors(roots))
                if self._is_spread():  # no process may repeat anything alone
                    return
                self._investigate(lambda inquiry: inquiry.of_loss(_tensors(roots)), calls)
            elif every:
                self._prepare(calls, _tensors(roots))
                if calls and self._price is not None:
                    self._weigh(calls[0], started, self._price)
        except Exception as error:  # nothing of it may reach the training
            self._capture_failed(error)

    def _are_finite(self, losses: list[Any]) -> bool:
        """Return whether all losses that may be read are finite; one on a device is a tensor, which only "wait" waits for."""
        for one in losses:  # noqa: SIM110  a generator costs more, on each backward
            if (type(one) is float or self._mode == "wait") and not math.isfinite(one):
                return False
        return True

    def _prepare(self, calls: list[Call], losses: list[Tensor]) -> None:
        """Have the gradients of the model's outputs kept, and what the loss has that may be singular."""
        roots = {id(one) for one in losses}
        ends = []
        for call in calls:
            call.begin_backward()
            outputs = call.outputs
            ends += [one.grad_fn for one in outputs]
            roots_here = [one for one in outputs if id(one) in roots]
            for one in roots_here or outputs:  # a model that returns its loss needs the gradients of nothing else
                if one.requires_grad and not one.is_leaf and one.nbytes <= _LARGEST:
                    one.retain_grad()
        self._singular.keep([one.grad_fn for one in losses], frozenset(ends))

    def backward_ended(self) -> None:
        """End the watching of a step, if it was watched; find the origin of gradients that are not finite."""
        model = self._model()
        if not self._armed.on or model is None:
            return
        try:
            self._watched(gradients_of(model))
            self._armed.stop()
            self.watching = False
        except Exception as error:  # nothing of it may reach the training
            self._capture_failed(error)

    def gradients_arrived(self, row: Row, together: Together | None = None) -> None:
        """Find the origin of gradients, or of weights, that are not finite, before the step is judged."""
        self._step = row.step
        self._in_trouble = True
        together = together if row.nonfinite is not None and self._sharing.is_due(together) else None
        try:
            if self._is_spread():
                self._look_together(row, together)
            elif not row.loss_nonfinite:  # else it was looked at when the backward began
                self._investigate(lambda inquiry: inquiry.of_gradients(self._singular), list(self._capture.calls))
        finally:
            if row.nonfinite is not None:
                self._sharing.trouble()
            if together is not None:
                self._share(together)
            self._findings.tell_reason()

    def _share(self, together: Together) -> None:
        """Tell the other processes what was found here, and show what one of them has found if nothing was."""
        found = self._sharing.share(together, self._findings.origin)
        if found is not None and found is not self._findings.origin:
            self._findings.tell(found)

    def _look_together(self, row: Row, together: Together | None) -> None:
        """Repeat the forward in all processes at once, if all of them can: each has a part of the weights."""
        model, calls = self._model(), list(self._capture.calls)
        free = not self._findings.explained and self._left > 0
        ready = model is not None and free and can_repeat_together(model, calls)
        if together is not None and self._sharing.agree(together, ready=ready):
            backward = not row.loss_nonfinite
            self._investigate(lambda inquiry: inquiry.of_all_together(self._singular, backward=backward), calls)
        elif not self._findings.explained and self._left:
            self._note(
                "which operation made a step non-finite is not looked for under DeepSpeed."
                if model is not None and engine_of(model) is not None
                else "which operation made a step non-finite is not looked for, since the weights are spread over processes and "
                "not all of them can repeat the step: run it inside gradwatch.find_nonfinite(model) in all of them."
            )

    def _watched(self, tensors: list[Tensor]) -> None:
        """Find the origin of tensors in a step that is being watched."""
        if not self._armed.on or self._findings.explained:
            return
        started = perf_counter()
        origin = self._armed.origin_in(tensors)
        if origin is not None and not self._is_left_over(origin):
            self._armed.disarm()
            self._findings.tell(origin.at(self._step, perf_counter() - started))

    def _is_left_over(self, origin: Origin) -> bool:
        """Return whether a finding may be what a step has left that was not explained, such as a state that is carried on.

        If that step got finite inputs, one that is not finite now was not loaded so.
        """
        if origin.subject in ("weight", "buffer"):
            return self._was_in_trouble or self._unexplained
        return origin.subject in ("input", "argument") and self._unexplained and self._got_finite

    def _is_spread(self) -> bool:
        model = self._model()
        return model is not None and is_spread(model)

    def step_over(self, optimizer: Optimizer | None) -> None:
        """Drop what was kept of the step."""
        if self._in_trouble or self._was_in_trouble:
            self._sharing.step_over()
            self._findings.step_over(in_trouble=self._in_trouble)
        if self._armed.steps:
            self._armed.step_over()
            if not self._armed.steps and self._only_armed:  # its inputs are not kept otherwise
                self._capture.stop()
        self._unexplained = self._unexplained and self._in_trouble
        self._was_in_trouble, self._in_trouble = self._in_trouble, False
        if optimizer is not None and (self._optimizer is None or self._optimizer() is not optimizer):
            self._optimizer = weakref.ref(optimizer)
        self._step += 1
        if self._capture.calls or self._batch is not None or self._backward is not None:
            self._forget()

    def _weigh(self, call: Call, started: float, price: Price) -> None:
        """Capture nothing any more if steps are so short that it would be felt; decide that once."""
        price.add(call.started, started - call.started, call.took + perf_counter() - started)
        if price.known:
            self._price = None
            if price.too_high:
                self._capture.stop()

    # Rows of a device, which come later.

    def row_sent(self) -> None:
        """Keep the inputs of the step whose row a device is about to send."""
        self._earlier.row_sent(self._capture.calls if self._mode != "wait" else [])

    def row_arrived(self, row: Row) -> None:
        """Find the origin of a row that a device has sent, with the weights of today."""
        calls, lag = self._earlier.row_arrived(), self._earlier.lag
        if calls and (row.loss_nonfinite or row.nonfinite is not None):
            self._step = row.step
            self._investigate(lambda inquiry: inquiry.of_inputs(lag), calls)

    # One investigation.

    def _investigate(self, look: Callable[[Investigation], Origin], calls: list[Call]) -> None:
        model = self._model()
        if model is None or self._findings.explained or not self._left:
            return
        self._left -= 1
        calls = list(calls)
        started = perf_counter()
        self._capture.pause(on=False)
        self._armed.stop()
        try:
            with torch.enable_grad():
                inquiry = Investigation(model, calls, self._backward, self._batch, may_run=self._mode == "lines")
                origin = look(inquiry)
            if self._is_left_over(origin):
                what = f"`{origin.name}` was not finite already, after a step whose operation is not known"
                self._findings.nothing(f"which operation made step {self._step} non-finite is not known: {what}")
                return
            optimizer = self._optimizer() if self._optimizer is not None else None
            if origin.subject == "weight" and optimizer is not None and not self._was_in_trouble:
                origin = update_origin(optimizer, self._step) or origin
            origin = origin.at(self._step, perf_counter() - started)
            self._findings.tell(origin)
            if self._folder is not None and inquiry.guilty is not None:
                keep(self._folder, model, inquiry.guilty, origin)
        except NothingFound as reason:
            self._unexplained = True
            self._got_finite = bool(calls) and all(map(_got_finite, calls))
            self._arm(model)
            self._findings.nothing(
                f"which operation made step {self._step} non-finite is not known: {reason}; "
                f"looking for it took {number(1e3 * (perf_counter() - started))} ms"
            )
        except Exception as error:  # nothing of it may reach the training
            self._failed(error)
        finally:
            self._capture.pause(on=True)

    def _arm(self, model: nn.Module) -> None:
        """Watch the next steps, whether or not their inputs were kept so far."""
        if self._armed.arm(model):
            self._only_armed = self._only_armed or not self._capture.installed
            self._capture.start()


def _got_finite(call: Call) -> bool:
    """Return whether what a forward got is finite."""
    try:
        return not any(is_nonfinite(one) for _, one in tensors_in([call.args, call.kwargs]))
    except RuntimeError:  # a tensor of a kind that has no such numbers
        return False


def _tensors(roots: Any) -> list[Tensor]:
    return [one for one in (roots if isinstance(roots, (list, tuple)) else [roots]) if isinstance(one, torch.Tensor)]
