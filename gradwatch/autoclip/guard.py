"""The corrections of auto-clip with an automatic threshold beyond its clip, for outlier layers and for steps that overshoot.

Both are computed from the norms of whole layers, which all processes share, so all processes act alike, and from what is known
before the step. They act on numbers of the host as on those of a device, of which none is read. The limit on the predicted
decrease of an SGD step is Polyak's rule (Loizou et al. 2021, "Stochastic Polyak step-size for SGD") with a floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch.clips.base import Step, UnreadStep, scale_each
from gradwatch.measure.norms import on_device

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.autoclip.limits import AutoClipLimits
    from gradwatch.clips import Clip
    from gradwatch.records import Floats

_NOTHING = 1e-3  # smallest loss to divide by, as a share of the reference loss


@dataclass(frozen=True, slots=True)
class Guard:
    """The corrections of one step for ``L`` layers, as far as they are known before it.

    Args:
        usual: usual gradient norms of the layers, shape (L,); NaN where they are unknown.
        rates: factor on the squared gradient norm of each layer that gives the first-order decrease of the loss by the step,
            shape (L,); NaN where nothing is predicted.
        reference: reference loss of the run.
        looseness: factor by which the bounds are loosened.
        limits: the limits of auto-clip.
    """

    usual: Floats
    rates: Floats
    reference: float
    looseness: float
    limits: AutoClipLimits

    def around(self, clip: Clip, step: Step | UnreadStep, whole: Tensor, loss: float | Tensor) -> Any:
        """Apply ``clip`` and the corrections; return the global norm after over the norm before, as ``clip`` does.

        ``whole`` are the norms before any clip of the user's own, of shape (n,), and ``loss`` is the loss of the step.

        The ratio is exact if the clip keeps the direction. Otherwise it is approximate, because the effect of the clip on each
        layer is not measured. Overshooting steps are scaled after the clip, except if the clip looks inside gradients: its
        effect may then differ between processes, so they are scaled before it.
        """
        if isinstance(step, Step) and not math.isfinite(step.global_norm):
            return clip.apply(step)
        norms = torch.from_numpy(step.norms) if isinstance(step, Step) else step.norms
        held = self._held(norms, loss)
        factors = _where_it_acts(self._apart(whole, step), step)
        if clip.looks_inside:
            factors = factors * self._within(factors * norms, 1.0, step, held)
        self._scale(step, factors)
        left = _ratio(factors * norms, norms)
        by_clip = self._clip(clip, step, factors * norms, left)
        if clip.looks_inside:
            return left * by_clip
        within = self._within(factors * norms, by_clip, step, held)
        self._scale(step, within)
        return _ratio(factors * within * norms, norms) * by_clip

    def _held(self, norms: Tensor, loss: float | Tensor) -> Tensor:
        """Return the loss that the step may take at most; infinite where it is not positive or not known."""
        floor = _NOTHING * abs(self.reference) if math.isfinite(self.reference) else -math.inf
        held = torch.clamp(loss if isinstance(loss, torch.Tensor) else torch.full_like(norms.sum(), loss), min=floor)
        return torch.where(held > 0, held, math.inf)

    def _apart(self, whole: Tensor, step: Step | UnreadStep) -> Tensor:
        """Return the factors on outlier layers, shape (n,)."""
        usual = self.usual[step.columns]
        if not (usual > 0).any():
            return torch.ones_like(whole)
        known = on_device(np.where(usual > 0, usual, np.nan), whole.device)
        surge = torch.where(whole > 0, whole / known, math.nan)
        middle = torch.clamp(torch.nanquantile(surge, 0.5), min=1.0)
        wanted = torch.clamp(self.limits.wide * self.looseness / surge, max=1.0)
        return torch.where(surge > self.limits.apart * middle, wanted, 1.0)

    def _within(self, norms: Tensor, by_clip: Any, step: Step | UnreadStep, held: Tensor) -> Tensor:
        """Return factors that limit the predicted decrease to the loss, for each group of layers with one learning rate.

        The decrease is predicted along the gradient, so it is linear in the factor of the clip. No factor is below the shortest.
        """
        rates = self.rates[step.columns]
        factors = torch.ones_like(norms)
        squares = torch.nan_to_num(torch.square(norms), nan=0.0, posinf=math.inf)
        for rate in np.unique(rates[np.isfinite(rates)]).tolist():
            group = on_device(rates == rate, norms.device)
            predicted = by_clip * rate * torch.where(group, squares, 0.0).sum()
            factor = torch.clamp(held / predicted, min=self.limits.shortest, max=1.0)
            factors = torch.where(group & (predicted > held), factor, factors)
        return _where_it_acts(factors, step)

    @staticmethod
    def _clip(clip: Clip, step: Step | UnreadStep, norms: Tensor, left: Tensor) -> Any:
        if isinstance(step, UnreadStep):
            return clip.apply_unread(replace(step, norms=norms, global_norm=step.global_norm * left))
        return clip.apply(replace(step, norms=norms.numpy(), global_norm=step.global_norm * float(left)))

    @staticmethod
    def _scale(step: Step | UnreadStep, factors: Tensor) -> None:
        if isinstance(step, UnreadStep) or bool((factors < 1.0).any()):
            scale_each(step.gradients, factors)


def _where_it_acts(factors: Tensor, step: Step | UnreadStep) -> Tensor:
    """Return the factors, or 1 where the clip of a step on a device does not act or its norms are not finite."""
    if isinstance(step, Step):
        return factors
    acts = torch.isfinite(step.global_norm)
    return torch.where(acts if step.fires is None else acts & step.fires, factors, 1.0)


def _ratio(after: Tensor, before: Tensor) -> Tensor:
    """Return the L2 norm of all layers as one vector after a change over that before it; 1 if there is none to compare."""
    ratio = torch.sqrt(torch.square(after).nansum() / torch.square(before).nansum())
    return torch.where(torch.isfinite(ratio), ratio, 1.0)
