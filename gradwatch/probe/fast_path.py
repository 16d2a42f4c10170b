"""The fast path of a step in a healthy run: measure, compare with the bounds, note the row.

The judge returns the bounds within which the coming rows need not be judged (`Bounds`). A step within them leaves the same
values behind as one that is recorded by `gradwatch.probe.step_recorder.StepRecorder.take`, with a fraction of the calls. A step
outside them, or one that is unusual in any other way, is recorded by `take` from its beginning.
"""

from __future__ import annotations

import math
import operator
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from gradwatch.measure.measured_gradients import Measured
from gradwatch.measure.norms import global_norm_of, norm_of
from gradwatch.probe.coming import BeforeClip

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.history.schedule import Bounds
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.loss_reader import LossReader
    from gradwatch.records import Floats, LossSource

_LARGEST = float(np.finfo(np.float64).max)
_FAR = 1.5  # factor by which a learning rate may change in one step that is not judged
_LEARNING_RATE = operator.itemgetter("lr")


Passed = Literal["not", "with alarm", "resting", "noted"]
UserClip = Literal["bounded", "unbounded"]  # without a bound, clips compute a norm


class FastPath:
    """Records the coming rows of one optimizer as long as they stay within bounds.

    Args:
        bounds: bounds of the rows.
        mine: gradients of the optimizer, which can be measured in one call.
        optimizer: the optimizer; held weakly.
        loss: the expected source of the loss.
        every: number of optimizer steps between rows.
        clip: the user's clip before each step; None: there is none.

    Attributes:
        mine: gradients of the optimizer.
        optimizer: weak reference to it.
    """

    def __init__(
        self,
        bounds: Bounds,
        mine: Gradients,
        optimizer: Optimizer,
        loss: LossSource,
        every: int,
        clip: UserClip | None,
    ) -> None:
        self._history = bounds.history
        self._left = bounds.rows
        self._every = every
        self._clip = clip
        self._total: Tensor | None = None  # of the user's clip of this step, and the norms that it came from
        self._norms: Floats | None = None
        self._coefficient = math.nan
        self._before: BeforeClip | None = None
        self._until = bounds.until
        self._loss = bounds.loss
        self._loss_source = loss
        self.mine = mine
        self.optimizer = weakref.ref(optimizer)
        _, columns, self._plan = mine.present()
        # an optimizer may hold the layers in another order
        in_order = np.array_equal(columns, np.arange(len(bounds.grad_norm)))
        self._columns = None if in_order else columns
        band = bounds.grad_norm if self._columns is None else bounds.grad_norm[columns]
        self._band = np.minimum(band, _LARGEST)  # an infinite norm is never within bounds
        self._probe = mine.cheapest_probe(columns)
        self._has_rates = all("lr" in group for group in optimizer.param_groups)

    @property
    def resting(self) -> bool:
        """True if the next step makes no row."""
        return self._every > 1 and self.mine.steps % self._every != 0

    @property
    def shared(self) -> bool:
        """True if the norm of the user's clip in this step was computed here."""
        return self._before is not None and self._before is self.mine.coming.before_clip

    def hand_over(self) -> None:
        """Pass on the norms from which the user's clip of this step was computed, before the fast path is left."""
        if not self.shared or self._norms is None or self._before is None:
            return
        columns = np.arange(len(self._history.layers)) if self._columns is None else self._columns
        norms = np.full(len(self._history.layers), np.nan)
        norms[columns] = self._norms
        self._before.take(Measured([], columns, norms, global_norm_of(self._norms)))

    def share(self, tensors: list[Tensor]) -> Tensor | None:
        """Return the norm of gradients that the user is about to clip, as one vector; None if torch has to compute it."""
        before, plan = self.mine.coming.before_clip, self._plan
        if before is not None and before.next_begins():  # another clip in the same step
            return None
        self.mine.coming.forget_clip()
        self._before = None
        if not self._left or self.resting or plan is None or not plan.shareable or self._clip is None:
            return None
        if self.optimizer() is None:  # another optimizer will use these gradients
            return None
        gradients, _, now = self.mine.present()
        if now is not plan or len(tensors) != len(gradients) or not all(map(operator.is_, tensors, gradients)):
            return None
        norms, total = plan.shared(gradients)
        if not self._holds(norms):
            return None
        self._norms, self._total, self._coefficient = norms, total, math.nan
        self._before = BeforeClip(self.mine.parameters)
        self.mine.coming.clip_begins(self._before)
        return total

    def scaled(self, total: Tensor, max_norm: float) -> None:
        """Record the coefficient of the user's clip, if its norm was computed here."""
        if total is self._total and (self._clip == "bounded") is (max_norm != math.inf):
            self._coefficient = min(1.0, max_norm / (total.item() + 1e-6))

    def _probe_is_within(self, losses: LossReader) -> bool:
        """Return whether the gradient of one layer and the loss are within bounds, at a step that makes no row."""
        index, parameter = self._probe
        gradient = parameter.grad
        if gradient is not None:
            plain = gradient.layout is torch.strided and gradient.dtype is torch.float32
            if not (torch.linalg.vector_norm(gradient).item() if plain else norm_of(gradient)) <= self._band[index]:
                return False
        loss, source = losses.read(self.mine.coming, None)
        return source == "none" or loss <= self._loss

    def _clipped_norms(self) -> Floats | None:
        return self._norms if self._before is not None and self.shared and self._before.holds else None

    def _measured(self) -> Floats | None:
        gradients, _, plan = self.mine.present()
        if plan is not self._plan or plan is None or self.mine.coming.before_clip is not None:
            return None
        norms = plan.norms(gradients)
        return norms if self._holds(norms) else None

    def _holds(self, norms: Floats) -> bool:
        # a norm of zero may be an underflow, which `take` of the recorder checks; counting is numpy's fastest test
        count = len(norms)
        return bool(np.count_nonzero(norms <= self._band) == count and np.count_nonzero(norms) == count)

    def take(self, optimizer: Optimizer, step: int, losses: LossReader) -> Passed:
        """Note the row of ``step``, or make none if none is due.

        Returns:
            ``"noted"`` or ``"resting"`` (no row is due) if the step is done. ``"not"``, or ``"with alarm"`` if a step
            without a row is out of bounds: nothing was changed, and the step has to be recorded as usual.
        """
        mine = self.mine
        if optimizer is not self.optimizer() or losses.scaler is not None:
            return "not"
        if self.resting:
            if not self._probe_is_within(losses):
                return "with alarm"
            mine.count_step()
            self._used(losses)
            return "resting"
        loss, source = losses.read(self.mine.coming, None)
        expected = source == self._loss_source and (loss <= self._loss or source == "none")
        if not self._left or not expected or perf_counter() > self._until or mine.is_stale(optimizer):
            return "not"
        norms, coefficient = (self._clipped_norms(), self._coefficient) if self._clip else (self._measured(), 1.0)
        rates = list(map(_LEARNING_RATE, optimizer.param_groups)) if self._has_rates else mine.told_rates
        if norms is None or not coefficient > 0 or (rates != mine.told_rates and not self._takes_near(rates)):
            return "not"
        self._left -= 1
        mine.count_step()
        self._history.note(step, loss, norms, self._columns, coefficient, mine.largest_rate)
        self._used(losses)
        return "noted"

    def _takes_near(self, rates: Any) -> bool:
        """Look at learning rates that may have changed; return whether by little, so that the update need not be judged."""
        mine = self.mine
        before = mine.largest_rate
        mine.look_at_rates(rates)
        return before / _FAR <= mine.largest_rate <= _FAR * before or not before > 0

    def _used(self, losses: LossReader) -> None:
        if losses.given:
            losses.used(self.mine.coming)
        self.mine.coming.used()
        self._before = self._total = None
