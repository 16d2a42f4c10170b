"""What auto-clip with an automatic threshold does beyond its clip: layers that stand out, and steps that overshoot.

Both follow from numbers of whole layers that all processes share, so that all do alike. That a step of SGD should ask for no
more than the loss holds is Polyak's rule (Loizou et al. 2021, "Stochastic Polyak step-size for SGD"), with a floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.clips.base import scale_by

if TYPE_CHECKING:
    from gradwatch.clips import Clip
    from gradwatch.clips.base import Step
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Row

_APART = 8.0  # times the median layer's surge: a layer that stands out alone
WIDE = 2.0  # times the usual norm: where an automatic threshold begins, and what is left of such a layer
_SHORTEST = 1 / 4  # of what the clip left: a gradient that is far off says little of how long a step may be
_NOTHING = 1e-3  # of the reference loss: a loss that nobody need divide by


@dataclass(frozen=True, slots=True)
class Guard:
    """One step's. ``L`` layers; all arrays have shape (L,).

    ``norms``: gradient norms of whole layers. ``factors``: what is left of each layer before the clip. ``promise``: by how
    much each layer's step would lower the loss to first order, ``rates``: at which learning rate. ``held``: the loss.
    """

    norms: Floats
    factors: Floats
    promise: Floats
    rates: Floats
    held: float

    @classmethod
    def of(cls, row: Row, history: History, usual: Floats, looseness: float) -> Guard | None:
        """Return the guard for ``row``; None where no layer stands out from ``usual`` norms and no step overshoots."""
        norms = row.grad_norm
        factors = np.ones(len(norms))
        if len(usual) == len(norms):
            surge = norms / usual
            known = surge[surge > 0]
            if known.size:
                apart = surge > _APART * max(1.0, float(np.median(known)))
                factors = np.where(apart, np.fmin(1.0, WIDE * looseness * usual / norms), 1.0)
        promise = history.promise * np.square(factors)
        held = max(row.loss, _NOTHING * abs(history.reference_loss))
        if not (factors < 1.0).any() and not np.nansum(promise) > held > 0:
            return None
        return cls(norms, factors, promise, history.rate, held if held > 0 else math.inf)

    def around(self, clip: Clip, step: Step) -> float:
        """Apply the clip and what goes beyond it; return the global norm left over the one before.

        It is exact where the clip keeps directions, and else nearly so: what the clip leaves of each layer is not asked.
        Steps come last, but before a clip that looks inside gradients: what it leaves may differ between processes.
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
        """Return the factors by which layers of one learning rate together ask for no more than the loss holds."""
        factors = np.ones(len(self.promise))
        for rate in np.unique(self.rates[np.isfinite(self.rates)]):
            group = self.rates == rate
            promised = left * float(np.nansum(self.promise[group]))
            if promised > self.held:
                factors[group] = max(_SHORTEST, self.held / promised)
        return factors

    @staticmethod
    def _scale(step: Step, factors: Floats) -> None:
        wanted = factors[step.columns]
        for factor in np.unique(wanted[wanted < 1.0]):
            scale_by([step.gradients[place] for place in np.flatnonzero(wanted == factor)], float(factor))


def _together(norms: Floats) -> float:
    """Return the L2 norm of all layers as one vector; those without a gradient are NaN."""
    return float(np.sqrt(np.nansum(np.square(norms))))
