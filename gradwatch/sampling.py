"""What is looked at now and then, not on each step: weight norms, dead units, weights that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.columns import widened
from gradwatch.measure import NormPlan, fingerprint, live_units, look_closer
from gradwatch.wrappers import local_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from gradwatch.gradients import Measured
    from gradwatch.layers import Layers
    from gradwatch.records import Floats

_FIRST_ROWS = 32  # weights are sampled on each of them
_WEIGHTS_EVERY = 16
_CENSUS_EVERY = 61  # odd, as the first censuses are even and odd: parts of a model that take turns are all seen
_FIRST_CENSUSES = frozenset((5, 10, 17, 24, 33, 44))
_ROUND = 4  # censuses of a layer after which a unit without any gradient is called dead


@dataclass(slots=True)
class Sample:
    """What was looked at with one row; None where it was not its turn. Arrays have shape (L,).

    ``row`` counts the rows since attach.
    """

    row: int
    weight_norm: Floats | None = None
    nonfinite_weight: NDArray[np.bool_] | None = None
    dead_share: Floats | None = None
    unchanged: Floats | None = None


class Sampling:
    """The sampled statistics of one model, by rows since it was attached."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._plan: NormPlan | None = None
        self._planned = 0
        self._rows = 0
        self._prints: dict[int, int] = {}
        self._alive: dict[int, tuple[int, Tensor]] = {}
        self._dead_share = np.full(len(layers), np.nan)
        self._unchanged = np.zeros(len(layers))

    def grow(self) -> None:
        """Take the columns of layers that were added."""
        self._dead_share = widened(self._dead_share, len(self._layers), np.nan)
        self._unchanged = widened(self._unchanged, len(self._layers), 0.0)
        self._plan = None

    def take(self, now: Measured, *, closely: bool) -> Sample:
        """Look at what is due with this row; ``closely``: the weights are. Runs without autograd."""
        row, self._rows = self._rows, self._rows + 1
        sample = Sample(row)
        if closely or row < _FIRST_ROWS or row % _WEIGHTS_EVERY == 0:
            self._weights(sample)
        if row == 0 or row in _FIRST_CENSUSES or row % _CENSUS_EVERY == 0:
            self._count_units(now)
            self._compare(row)
            sample.dead_share, sample.unchanged = self._dead_share.copy(), self._unchanged.copy()
        return sample

    def _weights(self, sample: Sample) -> None:
        columns, whole = zip(*self._layers.parameters(), strict=True)
        parameters = [local_of(parameter) for parameter in whole]
        if self._plan is None or self._planned != len(parameters):
            self._plan, self._planned = NormPlan(parameters), len(parameters)
        norms = np.full(len(self._layers), np.nan)
        norms[list(columns)] = self._plan.norms(parameters)
        nonfinite = np.zeros(len(self._layers), dtype=bool)
        for place in np.flatnonzero(~np.isfinite(norms[list(columns)])).tolist():
            nans, infs, norms[columns[place]] = look_closer(parameters[place])
            nonfinite[columns[place]] = nans + infs > 0
        sample.weight_norm, sample.nonfinite_weight = norms, nonfinite

    def _count_units(self, now: Measured) -> None:
        if not now.gradients:
            return
        for gradient, column in zip(now.gradients, now.columns.tolist(), strict=True):
            if not self._layers.with_units[column] or not gradient.numel() or gradient.is_sparse:
                continue
            looks, live = self._alive.get(column, (0, None))
            seen = live_units(gradient)
            looks, live = looks + 1, seen if live is None else live | seen
            self._alive[column] = looks, live
            if looks == _ROUND:
                self._dead_share[column] = 1.0 - live.float().mean().item()
                del self._alive[column]

    def _compare(self, row: int) -> None:
        """Compare the weights with those of the first row, exactly."""
        for column, parameter in self._layers.parameters():
            if row and column not in self._prints:  # it has changed: it is not frozen, for good
                continue
            if not parameter.requires_grad or not parameter.numel():
                continue
            now = fingerprint(parameter)
            if self._prints.setdefault(column, now) == now:
                self._unchanged[column] = row
            else:
                del self._prints[column]
                self._unchanged[column] = 0
