"""Clip each layer relative to an average of its own past norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from gradwatch.clips.base import Baseline, Clip, FromHistory, news
from gradwatch.clips.layer_norm import LayerBounds
from gradwatch.clips.norm import ClipNorm
from gradwatch.history.columns import widened

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats


class ClipAdaGC(FromHistory):
    """Scale the gradient of each layer so that its norm is at most ``ratio`` times the average of its past norms.

    ``g_i <- g_i * min(1, ratio * a_i / ||g_i||)``, where ``a_i`` is an exponential average of the norms of layer i after
    clipping; ``decay`` is the weight of the past. During the first ``warm_up`` steps the global norm is clipped to
    ``max_norm``, and ``a_i`` is the smallest norm so far. Norms that are not finite are ignored. Source: Wang et al.,
    "AdaGC: improving training stability for large language model pretraining" (2025), arXiv:2502.11034.
    """

    ratio: float = Field(default=1.04, gt=0)
    decay: float = Field(default=0.99, gt=0, lt=1)
    warm_up: int = Field(default=100, ge=1)
    max_norm: float = Field(default=1.0, gt=0)

    def __init__(self, ratio: float = 1.04, **settings: Any) -> None:
        super().__init__(ratio=ratio, **settings)

    def baseline(self) -> Baseline:
        return _Averages(self)


class _Averages:
    """The average of the past norms of each layer, shape (L,); NaN before its first norm."""

    def __init__(self, settings: ClipAdaGC) -> None:
        self._settings = settings
        self._average: Floats = np.zeros(0)
        self._rows = 0

    def clip(self, history: History, rows: int) -> Clip | None:
        if len(self._average) < len(history.layers):
            self._average = widened(self._average, len(history.layers), np.nan)
        where = news(history, self._rows, rows)
        norms, totals = history.grad_norm()[where], history.global_norm()[where]
        for number, (row, total) in enumerate(zip(norms, totals.tolist(), strict=True), rows - len(norms)):
            if math.isfinite(total):
                self._follow(row, total, number)
        self._rows = rows
        if rows < self._settings.warm_up:
            return ClipNorm(self._settings.max_norm)
        return LayerBounds(bounds=self._settings.ratio * self._average)

    def _follow(self, norms: Floats, total: float, number: int) -> None:
        """Update the averages with the norms of row ``number``; NaN where a layer had no gradient."""
        if number < self._settings.warm_up:
            left = norms * min(1.0, self._settings.max_norm / total) if total > 0 else norms
            self._average = np.fmin(self._average, left)
            return
        left = np.where(np.isnan(self._average), norms, np.minimum(norms, self._settings.ratio * self._average))
        step = np.where(np.isnan(left), 0.0, (1.0 - self._settings.decay) * (left - self._average))
        self._average = np.where(np.isnan(self._average), left, self._average + step)
