"""What is looked at now and then, not on each step: weight norms, dead units, weights that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch.measure import NormPlan, fingerprint, live_units, look_closer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from gradwatch.layers import Layers
    from gradwatch.records import Floats

FIRST_STEPS = 32  # weights are sampled on each of them
WEIGHTS_EVERY = 16
CENSUS_EVERY = 64
_FIRST_CENSUSES = frozenset((8, 16, 24, 32, 48))
_ROUND = 4  # censuses after which a unit without any gradient is called dead


@dataclass(slots=True)
class Weights:
    """Weight norms of one moment, shape (L,), and which layers hold values that are not finite."""

    norms: Floats
    nonfinite: NDArray[np.bool_]


class Sampling:
    """The sampled statistics of one model. Arrays have shape (L,)."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._plan: NormPlan | None = None
        self._planned = 0
        self._prints: dict[int, int] = {}
        self._alive: dict[int, Tensor] = {}
        self._censuses = 0
        self.dead_share = np.full(len(layers), np.nan)
        self.unchanged = np.zeros(len(layers))

    @torch.no_grad()
    def weights(self) -> Weights:
        """Measure the norm of every layer's weights."""
        columns, parameters = zip(*self._layers.parameters(), strict=True)
        if self._plan is None or self._planned != len(parameters):
            self._plan, self._planned = NormPlan(parameters), len(parameters)
        norms = np.full(len(self._layers), np.nan)
        norms[list(columns)] = self._plan.norms(list(parameters))
        nonfinite = np.zeros(len(self._layers), dtype=bool)
        for column, parameter in zip(columns, parameters, strict=True):
            if not np.isfinite(norms[column]):
                nans, infs, norms[column] = look_closer(parameter)
                nonfinite[column] = nans + infs > 0
        return Weights(norms, nonfinite)

    def weights_due(self, step: int) -> bool:
        """True on the first steps and on every sixteenth."""
        return step < FIRST_STEPS or step % WEIGHTS_EVERY == 0

    def census_due(self, step: int) -> bool:
        """True on the steps on which units and fingerprints are looked at."""
        return step in _FIRST_CENSUSES or step % CENSUS_EVERY == 0

    @torch.no_grad()
    def census(self, step: int, gradients: Sequence[Tensor], columns: Sequence[int]) -> None:
        """Look at the units of these gradients, and at whether weights have changed since step 0."""
        self._count_units(gradients, columns)
        for column, parameter in self._layers.parameters():
            if step and column not in self._prints:  # it has changed: it is not frozen, for good
                continue
            if not parameter.requires_grad or not parameter.numel():
                continue
            now = fingerprint(parameter)
            if self._prints.setdefault(column, now) == now:
                self.unchanged[column] = step
            else:
                del self._prints[column]
                self.unchanged[column] = 0

    def _count_units(self, gradients: Sequence[Tensor], columns: Sequence[int]) -> None:
        for gradient, column in zip(gradients, columns, strict=True):
            if self._layers.with_units[column] and gradient.layout is torch.strided and gradient.numel():
                live = live_units(gradient)
                self._alive[column] = self._alive[column] | live if column in self._alive else live
        self._censuses += 1
        if self._censuses < _ROUND:
            return
        for column, live in self._alive.items():
            self.dead_share[column] = 1.0 - live.float().mean().item()
        self._alive.clear()
        self._censuses = 0
