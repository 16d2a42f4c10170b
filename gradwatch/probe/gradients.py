"""The gradients of the watched parameters of one optimizer: which there are, and how they are measured."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.measure.layers import family_of
from gradwatch.measure.measured_gradients import Measured
from gradwatch.measure.norms import NormPlan, bits_of, code_of, count_nonfinite, global_norm_of, has_bits, unfit
from gradwatch.measure.readback import Unread
from gradwatch.measure.wrappers import is_dtensor, local_of, summed
from gradwatch.probe.held import Held
from gradwatch.probe.steering import Steering, is_fused
from gradwatch.skipping import Skip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.probe.coming import Coming, Loss
    from gradwatch.records import Family, Floats


_WAITED = 16  # steps of an outer optimizer without one of its inner optimizer, which is then assumed never to step


class Gradients:
    """The gradients of the watched parameters of one optimizer, of all that no optimizer is known to own, or of all.

    Args:
        pairs: column and parameter of each.
        layers: total number of columns.
        groups: index of the parameter group of each pair.
        total: number of parameters in the optimizer, watched or not.
        optimizer: the optimizer; None if there is none.
        model: the watched model.
        coming: what is known of the coming step.
        around: another optimizer over the same parameters, which this one wraps and steps.
        number: index of the optimizer in the order in which they were found; -1: no optimizer.

    Attributes:
        optimizer: weak reference to the optimizer; None if there is none.
        parameters, columns: the parameters and their columns.
        coming: what is known of the coming step.
        steps: number of steps of the optimizer.
        family: family of the optimizer.
        number: index of the optimizer in the order in which they were found; -1: no optimizer.
        around: weak reference to the optimizer that this one wraps; None if it makes its steps itself.
        outer: gradients of the optimizer that wraps this one, while that one steps.
        sharded: True if this process holds only parts of the parameters.
        skip: leaves steps out.
        steering: what the optimizer is given for one step.
        told_rates: learning rates from which ``largest_rate`` was computed; None if it is to be computed at each step, because
            it is not known yet, or a rate is a tensor, which may change in place.
        largest_rate: largest learning rate of the layers; NaN if none is known.
        left_out: columns whose gradients turned out not to be measurable, with the reason.
        hidden: True if gradients are not in ``grad`` when a backward is over.
    """

    skips: type[Skip] = Skip
    hidden = False

    def __init__(
        self,
        pairs: Sequence[tuple[int, nn.Parameter]],
        layers: int,
        groups: Sequence[int] = (),
        total: int = 0,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        *,
        coming: Coming,
        around: weakref.ref[Optimizer] | None = None,
        number: int = -1,
    ) -> None:
        self.coming = coming
        self.around = around
        self.outer: Gradients | None = None
        self.vain = 0  # steps since the last step of the inner optimizer
        self.parameters = [parameter for _, parameter in pairs]
        self.columns = np.array([column for column, _ in pairs], dtype=np.intp)
        self.total = total
        self.family: Family = family_of(optimizer) if optimizer is not None else "other"
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else None
        self._held = Held(optimizer) if optimizer is not None else None
        self.steps = 0
        self.number = number
        self.left_out: list[tuple[int, str]] = []
        self._zero = np.zeros(layers, dtype=bool)
        self._any_zero = False
        self._layers = layers
        self._groups = np.asarray(groups, dtype=np.intp)
        self.sharded = any(is_dtensor(parameter) for parameter in self.parameters)
        self._whole = bool(np.array_equal(self.columns, np.arange(layers)))
        self._plan: NormPlan | None = None
        self._planned: list[bool] | None = None  # which gradients the plan is for; None: all
        self._rates: list[float] = []
        self.told_rates: list[Any] | None = None
        self.largest_rate = math.nan
        self._rate = np.full(layers, np.nan)
        self.skip = self.skips(optimizer, model) if optimizer is not None else None
        self.steering = Steering()

    def count_step(self) -> None:
        """Count a step of this optimizer."""
        self.steps += 1

    def leave_step_to(self, inner: Gradients | None) -> bool:
        """Leave the step to ``inner``, the optimizer that this one wraps, unless it never steps; return whether it was left."""
        if inner is None:
            self.around = None
        elif inner.steps != self.steps:
            self.steps, self.vain = inner.steps, 0
        elif self.vain >= _WAITED:
            self.coming.take_over(inner.coming)
            self.around = None
        else:
            self.vain += 1
        if inner is not None and self.around is not None:
            inner.outer = self
        return self.around is not None

    def outer_is_over(self) -> None:
        """Record that the step of the optimizer that wraps this one is over."""
        self.outer = None

    def measure_at(self, home: torch.device) -> Measured | Unread:
        """Measure all gradients, and read their norms only if rows are made on a ``home`` where that does not wait."""
        return self.measure() if device.reading_is_free(home) else self.measure_unread(home)

    def measure(self, scale: float = 1.0) -> Measured:
        """Measure all gradients that exist now, in one batched call per device and dtype.

        ``scale`` is a loss scale that the gradients still carry; the norms are divided by it.
        """
        there, columns, plan = self.present()
        if plan is None:
            return Measured([], columns, np.full(self._layers, np.nan), math.nan)
        try:
            norms = plan.norms(there)
        except Exception:
            if not (self._follow_move(there) or self._leave_out()):
                raise
            return self.measure(scale)
        if self._whole and len(there) == self._layers:
            spread = norms
        else:
            spread = np.full(self._layers, np.nan)
            spread[columns] = norms
        measured = Measured(there, columns, spread, global_norm_of(norms))
        if not (norms.min() > 0 and measured.global_norm < math.inf):
            self._look_at_doubtful(measured)
        elif self._any_zero:
            self._zero[columns] = False
            self._any_zero = bool(self._zero.any())
        if scale != 1.0:
            measured.norms /= scale
            measured.global_norm /= scale
        return measured

    def measure_unread(self, home: torch.device, scale: Tensor | None = None) -> Unread:
        """Measure all gradients on their device without reading a value. Wide sums make a second look unnecessary."""
        there, columns, plan = self.present()
        if plan is None:
            return Unread([], columns, torch.zeros(0, dtype=device.widest_float(home), device=home))
        try:
            norms = plan.norms_on(home, there)
        except Exception:
            if not (self._follow_move(there) or self._leave_out()):
                raise
            return self.measure_unread(home, scale)
        return Unread(there, columns, norms if scale is None else norms / device.moved(scale, home))

    def _follow_move(self, gradients: list[Tensor]) -> bool:
        """Plan anew where a part of the model has moved to another device; return whether it has."""
        if self._plan is None or self._plan.devices == [gradient.device for gradient in gradients]:
            return False
        self._plan = None
        return True

    def _leave_out(self) -> bool:
        """Exclude the layers whose gradients cannot be measured; return False if there is none."""
        gradients = [parameter.grad for parameter in self.parameters]
        reasons = [None if gradient is None else unfit(gradient) for gradient in gradients]
        found = [(column, reason) for column, reason in zip(self.columns.tolist(), reasons, strict=True) if reason]
        fit = np.array([reason is None for reason in reasons])
        self.left_out += found
        self.parameters = [parameter for parameter, here in zip(self.parameters, fit, strict=True) if here]
        self.columns, self._groups = self.columns[fit], self._groups[fit] if len(self._groups) else self._groups
        self._whole, self._plan = self._whole and not found, None
        return bool(found)

    def present(self) -> tuple[list[Tensor], NDArray[np.intp], NormPlan | None]:
        """Return the gradients that exist now, their columns, and the plan by which their norms are computed.

        Of sharded gradients, the part of this process. The plan is None if there is no gradient.
        """
        there = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        if self.sharded:
            there = self._parts()
        columns, present = self.columns, None
        if len(there) < len(self.parameters):
            present = [parameter.grad is not None for parameter in self.parameters]
            columns = columns[present]
        if not there:
            return there, columns, None
        if self._plan is None or present != self._planned or there[0].device != self._plan.device:
            self._plan, self._planned = NormPlan(there), present
            self.steering.moved()
        return there, columns, self._plan

    def is_behind(self, roots: Any) -> bool:
        """Return whether a backward from ``roots`` has reached the parameters; only asked if gradients are ``hidden``."""
        raise NotImplementedError

    def clips_to(self) -> float | None:
        """Return the norm that the optimizer itself clips to in its step; None if it does not."""
        return None

    def own(self, losses: list[Loss]) -> list[Loss]:
        """Return the losses of a backward as their gradients count in the coming step."""
        return losses

    def with_gradient(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients `present` returns."""
        return [parameter for parameter in self.parameters if parameter.grad is not None]

    def columns_with_gradient(self) -> frozenset[int]:
        """Return the columns of the parameters that have a gradient."""
        return frozenset(self.columns[[parameter.grad is not None for parameter in self.parameters]].tolist())

    def _parts(self) -> list[Tensor]:
        """Return this process's part of each gradient; partial sums are first replaced by the sum over all processes."""
        parts = []
        for parameter in self.parameters:
            if parameter.grad is not None:
                whole = summed(parameter.grad)
                if whole is not parameter.grad:  # a clip must act on the sum, which the optimizer would compute itself
                    parameter.grad = whole
                parts.append(local_of(whole))
        return parts

    def cheapest_probe(self, columns: NDArray[np.intp]) -> tuple[int, nn.Parameter]:
        """Return the cheapest parameter whose gradient reveals trouble anywhere in the backward, and its index in ``columns``.

        What grows or is not finite anywhere reaches the parameters that come last in a backward, so the smallest of the
        first four of the model is chosen.
        """
        held = dict(zip(self.columns.tolist(), self.parameters, strict=True))
        first = np.argsort(columns)[:4].tolist()
        index = min(first, key=lambda index: held[int(columns[index])].numel())
        return index, held[int(columns[index])]

    def is_stale(self, optimizer: Optimizer) -> bool:
        """Return whether this was made for another optimizer, or for other parameters than the optimizer holds now."""
        if self.optimizer is None or self._held is None or self.optimizer() is not optimizer:
            return True
        return not self._held.is_held_by(optimizer)

    def _look_at_doubtful(self, measured: Measured) -> None:
        """Distinguish NaN, Inf, overflow and underflow of the norm for the layers whose norm is zero or not finite."""
        norms = measured.norms[measured.columns]
        doubtful = np.flatnonzero(~np.isfinite(norms) | ((norms == 0) & ~self._zero[measured.columns])).tolist()
        self._zero[measured.columns] &= norms == 0
        if not doubtful:  # layers that stay at zero
            return
        codes = np.zeros(self._layers, dtype=np.uint8)
        counts = {}
        for index in doubtful:
            gradient, column = measured.gradients[index], int(measured.columns[index])
            nans, infs, norm = count_nonfinite(gradient)
            if nans or infs:
                codes[column] = code_of(nans, infs)
                counts[column] = nans, infs
                norm = math.nan if nans else math.inf
            measured.norms[column] = norm
        self._any_zero = True
        self._zero = measured.norms == 0  # a layer that stays at zero is not checked again
        if counts:
            measured.nonfinite, measured.counts = codes, counts
            measured.global_norm = math.nan if (codes & 1).any() else math.inf
        else:
            measured.global_norm = float(np.linalg.norm(measured.norms[measured.columns]))

    def rate(self, optimizer: Optimizer, *, anew: bool = False) -> Floats:
        """Return the learning rate of each layer, shape (L,); NaN if it is not known, and for frozen layers.

        Which layers are frozen, ``requires_grad`` False, is looked up where a rate has changed, and with ``anew``.
        """
        rates = [_number(group.get("lr")) for group in optimizer.param_groups]
        if rates != self._rates or anew:
            self._rates = rates
            rate = np.full(self._layers, np.nan)
            trained = np.array([parameter.requires_grad for parameter in self.parameters], dtype=bool)
            rate[self.columns] = np.where(trained, np.array(rates)[self._groups], np.nan)
            if not np.array_equal(rate, self._rate, equal_nan=True):
                self._rate = rate
        return self._rate

    def look_at_rates(self, told: list[Any]) -> None:
        """Update ``largest_rate`` from the learning rates of all parameter groups."""
        rates = [rate for group in set(self._groups.tolist()) if not math.isnan(rate := _number(told[group]))]
        self.largest_rate = max(rates, default=math.nan)
        self.told_rates = None if any(isinstance(rate, torch.Tensor) for rate in told) else told

    def folds(self, optimizer: Optimizer | None) -> bool:
        """Return whether the optimizer can apply a factor on all gradients: it is fused, and all its parameters are watched."""
        return is_fused(optimizer) and self.total == len(self.parameters)

    def restore(self, *, late: bool = False) -> None:
        """Undo what was changed for a step: the optimizer's attributes, and what a step that is left out required.

        ``late`` is True if the step was made some time ago and raised.
        """
        if self.steering.used:
            self.steering.end()
        if self.skip is not None:
            self.skip.end(late=late)

    def zero(self) -> None:
        """Set all gradients to zero, for steps that cannot be left out, so that nothing non-finite reaches the weights."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()


def _number(rate: Any) -> float:
    """Return a learning rate as a number; NaN if there is none or it is on a device."""
    if isinstance(rate, torch.Tensor):
        return rate.item() if rate.is_cpu else math.nan
    return math.nan if rate is None else float(rate)


def zero_where(gradients: Sequence[Tensor], bad: Tensor) -> None:
    """Set gradients to zero in place if ``bad`` (bool tensor, no dimensions). Unlike a product, this removes NaN too."""
    everywhere, kept = device.Copies(bad), device.Copies(~bad)
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        here = everywhere.on(gradient.device)
        if has_bits(gradient):
            bits = bits_of(gradient)
            together.setdefault((bits.device, bits.dtype), []).append(bits)
        elif gradient.is_sparse:
            summed = gradient.coalesce()
            summed.values().masked_fill_(here, 0)
            gradient.copy_(summed)
        else:
            gradient.masked_fill_(here, 0)
    for (home, whole_number), bits_together in together.items():
        # as whole numbers, for NaN times 0 is NaN; one call for all gradients
        torch._foreach_mul_(bits_together, kept.on(home).to(whole_number))
