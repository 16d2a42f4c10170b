"""The corrections of auto-clip with an automatic threshold beyond its clip, for outlier layers and for steps that overshoot.

Both are computed from the norms of whole layers, which all processes share, so all processes act alike. The limit on the
predicted decrease of an SGD step is Polyak's rule (Loizou et al. 2021, "Stochastic Polyak step-size for SGD") with a floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.clips.base import scale_by

if TYPE_CHECKING:
    from gradwatch.autoclip.limits import AutoClipLimits
    from gradwatch.clips import Clip
    from gradwatch.clips.base import Step
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Row

_NOTHING = 1e-3  # smallest loss to divide by, as a share of the reference loss


@dataclass(frozen=True, slots=True)
class Guard:
    """The corrections of one step for ``L`` layers. All arrays have shape (L,).

    Args:
        norms: gradient norms of whole layers.
        factors: factor on the gradient of each layer before the clip.
        predicted_decrease: first-order decrease of the loss by the step of each layer.
        rates: learning rate of each layer.
        held: the loss; infinite if it is not positive.
        shortest: smallest factor on the clipped gradient.
    """

    norms: Floats
    factors: Floats
    predicted_decrease: Floats
    rates: Floats
    held: float
    shortest: float

    @classmethod
    def of(cls, row: Row, history: History, usual: Floats, looseness: float, limits: AutoClipLimits) -> Guard | None:
        """Return the guard for ``row``; None if no layer is an outlier and the step does not overshoot.

        Args:
            row: the row of the coming step.
            history: the history of the run.
            usual: usual gradient norms of the layers, shape (L,); NaN where unknown.
            looseness: factor by which the bounds are loosened.
            limits: the limits of auto-clip.
        """
        norms = row.grad_norm
        factors = np.ones(len(norms))
        if len(usual) == len(norms):
            surge = norms / usual
            known = surge[surge > 0]
            if known.size:
                apart = surge > limits.apart * max(1.0, float(np.median(known)))
                factors = np.where(apart, np.fmin(1.0, limits.wide * looseness * usual / norms), 1.0)
        predicted_decrease = history.predicted_decrease * np.square(factors)
        held = max(row.loss, _NOTHING * abs(history.reference_loss))
        if not (factors < 1.0).any() and not np.nansum(predicted_decrease) > held > 0:
            return None
        return cls(norms, factors, predicted_decrease, history.rate, held if held > 0 else math.inf, limits.shortest)

    def around(self, clip: Clip, step: Step) -> float:
        """Apply ``clip`` and the corrections; return the global norm after over the norm before.

        The ratio is exact if the clip keeps the direction. Otherwise it is approximate, because the effect of the clip on each
        layer is not measured. Overshooting steps are scaled after the clip, except if the clip looks inside gradients: its
        effect may then differ between processes, so they are scaled before it.
        """
        before = _together(self.norms)
        if not before > 0 or not math.isfinite(before) or not math.isfinite(step.global_norm):
            return clip.apply(step)
        factors = self.factors * self._within(1.0) if clip.looks_inside else self.factors
        self._scale(step, factors)
        left = _together(factors * self.norms) / before
        norms = step.norms * factors[step.columns]
        by_clip = clip.apply(replace(step, norms=norms, global_norm=step.global_norm * left))
        if clip.looks_inside:
            return left * by_clip
        within = self._within(by_clip)
        self._scale(step, within)
        return _together(factors * within * self.norms) / before * by_clip

    def _within(self, left: float) -> Floats:
        """Return factors that limit the predicted decrease to the loss, for each group of layers with one learning rate.

        ``left`` is the factor on the gradients so far. No factor is below the shortest.
        """
        factors = np.ones(len(self.predicted_decrease))
        for rate in np.unique(self.rates[np.isfinite(self.rates)]):
            group = self.rates == rate
            predicted = left * float(np.nansum(self.predicted_decrease[group]))
            if predicted > self.held:
                factors[group] = max(self.shortest, self.held / predicted)
        return factors

    @staticmethod
    def _scale(step: Step, factors: Floats) -> None:
        wanted = factors[step.columns]
        for factor in np.unique(wanted[wanted < 1.0]):
            scale_by([step.gradients[index] for index in np.flatnonzero(wanted == factor)], float(factor))


def _together(norms: Floats) -> float:
    """Return the L2 norm of all layers as one vector, ignoring NaN, which marks layers without a gradient."""
    return float(np.sqrt(np.nansum(np.square(norms))))
