"""Clip each layer by its own norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field

from gradwatch.clips.base import Clip, PerLayer, Step, UnreadStep, scale_by, scale_each
from gradwatch.measure.norms import on_device

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History
    from gradwatch.records import Floats


class ClipLayerNorm(PerLayer):
    """Scale the gradient of each layer so that its norm is at most ``max_norm``, which Keras calls ``clipnorm``.

    ``g_i <- g_i * min(1, max_norm / (||g_i|| + 1e-6))`` for each layer i, as `torch.nn.utils.clip_grad_norm_` applied to each
    parameter separately. The direction is kept within a layer, but not across layers. ``layers`` sets other bounds for layers
    by name. Source: Keras, ``keras.optimizers.Optimizer(clipnorm=...)``.
    """

    by_layer: ClassVar[bool] = True
    takes_threshold: ClassVar[bool] = True
    max_norm: float = Field(default=1.0, gt=0)

    def __init__(self, max_norm: float = 1.0, **settings: Any) -> None:
        super().__init__(max_norm=max_norm, **settings)

    def apply(self, step: Step) -> float:
        return clip_layers(step, self.bounds(self.max_norm, step.layers, step.columns))

    def apply_unread(self, step: UnreadStep) -> Tensor:
        return clip_layers_unread(step, self.bounds(self.max_norm, step.layers, step.columns))

    def loosened(self, factor: float) -> ClipLayerNorm:
        return ClipLayerNorm(self.max_norm * factor, layers=self.wider(factor))

    def at_norm(self, norm: float, history: History) -> LayerBounds:
        """Return bounds that split ``norm`` among the layers in proportion to their typical gradient norms."""
        typical = history.typical_grad.value
        share = typical / np.sqrt(np.nansum(np.square(typical)))
        return LayerBounds(bounds=np.where(share > 0, share * norm, norm))


class LayerBounds(Clip):
    """The clip that clips by layer apply in one step: a bound for the norm of each layer, shape (L,); NaN means no bound."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    by_layer: ClassVar[bool] = True
    bounds: Any

    def __str__(self) -> str:
        return f"ClipLayerNorm at {np.nanmin(self.bounds):.3g} to {np.nanmax(self.bounds):.3g}"

    def apply(self, step: Step) -> float:
        return clip_layers(step, self.bounds[step.columns])

    def apply_unread(self, step: UnreadStep) -> Tensor:
        return clip_layers_unread(step, self.bounds[step.columns])

    def loosened(self, factor: float) -> LayerBounds:
        return LayerBounds(bounds=self.bounds * factor)


def clip_layers(step: Step, bounds: Floats) -> float:
    """Scale each gradient to a norm of at most its bound; return the global norm after over the norm before.

    ``bounds`` has shape (n,). If the global norm is zero or not finite, nothing is changed and 1.0 is returned.
    """
    if not step.global_norm > 0 or not np.isfinite(step.global_norm):
        return 1.0
    factors = np.minimum(np.nan_to_num(bounds / (step.norms + 1e-6), nan=1.0), 1.0)
    clipped = np.flatnonzero(factors < 1.0)
    if not clipped.size:
        return 1.0
    for place in clipped.tolist():
        scale_by([step.gradients[place]], float(factors[place]))
    return float(np.linalg.norm(factors * step.norms)) / step.global_norm


def clip_layers_unread(step: UnreadStep, bounds: Floats) -> Tensor:
    """Scale each gradient as `clip_layers` does, without reading a value on the host; return the ratio, shape ()."""
    acts = (step.norms < np.inf).all()
    acts = acts if step.fires is None else acts & step.fires
    home = step.norms.device
    limits = on_device(np.nan_to_num(bounds, nan=np.inf), home)
    factors = torch.where(acts, torch.clamp(limits / (step.norms + 1e-6), max=1.0), 1.0)
    scale_each(step.gradients, factors)
    before = torch.sqrt(torch.square(step.norms).sum())
    left = torch.sqrt(torch.square(step.norms * factors).sum()) / before
    return torch.where(acts & (before > 0), left, 1.0)
