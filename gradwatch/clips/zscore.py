"""Clip by global norm where the norm is an outlier by its z-score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from gradwatch.clips.base import Baseline, FromHistory, OneFactor, news

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.history.history import History

_EPS = 1e-6


class ClipZScore(FromHistory):
    """Clip by global norm where the norm is an outlier among the norms before it, as ZClip does.

    ``z = (||g|| - m) / s``. If ``z > threshold``, the norm is scaled to ``m + threshold**2 / z * s``: the larger the outlier,
    the smaller the result. ``m`` and ``s**2`` are exponential averages of the norms after clipping and of their squared
    distance from ``m``; ``decay`` is the weight of the past. They start at the mean and variance of the first ``warm_up``
    norms, during which nothing is clipped. Norms that are not finite are ignored. Source: Kumar et al.,
    "ZClip: adaptive spike mitigation for LLM pre-training" (2025), arXiv:2504.02507.
    """

    threshold: float = Field(default=2.5, gt=0)
    decay: float = Field(default=0.97, gt=0, lt=1)
    warm_up: int = Field(default=25, ge=2)

    def __init__(self, threshold: float = 2.5, **settings: Any) -> None:
        super().__init__(threshold=threshold, **settings)

    def baseline(self) -> Baseline:
        return _Moments(self)


class ZBound(OneFactor):
    """The clip that `ClipZScore` applies in one step: a bound for norms with this ``mean`` and standard ``deviation``.

    Norms are divided by ``width`` before they are compared, and the bound is multiplied by it.
    """

    mean: float = Field(ge=0)
    deviation: float = Field(ge=0)
    threshold: float = Field(gt=0)
    width: float = Field(default=1.0, gt=0)

    def factor(self, global_norm: float) -> float:
        z = (global_norm / self.width - self.mean) / (self.deviation + _EPS)
        if not z > self.threshold:
            return 1.0
        return min(1.0, self.width * (self.mean + self.threshold**2 / z * self.deviation) / (global_norm + 1e-6))

    def factor_of(self, global_norm: Tensor) -> Tensor:
        z = (global_norm / self.width - self.mean) / (self.deviation + _EPS)
        limit = self.width * (self.mean + self.threshold**2 / z * self.deviation)
        return torch.where(z > self.threshold, torch.clamp(limit / (global_norm + 1e-6), max=1.0), 1.0)

    def loosened(self, factor: float) -> ZBound:
        """Return the same clip for norms that are ``factor`` times as large."""
        return self.model_copy(update={"width": self.width * factor})


class _Moments:
    """Exponential averages of the norms so far and of their variance."""

    def __init__(self, settings: ClipZScore) -> None:
        self._settings = settings
        self._first: list[float] = []
        self._mean = self._variance = math.nan
        self._rows = 0

    def clip(self, history: History, rows: int) -> ZBound | None:
        where = news(history, self._rows, rows)
        self._rows = rows
        left = history.global_norm()[where] * history.clip_coefficient()[where]
        for norm in left[~history.skipped()[where]].tolist():
            if math.isfinite(norm):
                self._follow(norm)
        if math.isnan(self._mean):
            return None
        return ZBound(mean=self._mean, deviation=math.sqrt(self._variance), threshold=self._settings.threshold)

    def _follow(self, norm: float) -> None:
        if not math.isnan(self._mean):
            new = 1.0 - self._settings.decay
            self._mean += new * (norm - self._mean)
            self._variance += new * ((norm - self._mean) ** 2 - self._variance)
            return
        self._first.append(norm)
        if len(self._first) == self._settings.warm_up:
            mean = sum(self._first) / len(self._first)
            self._variance = sum((value - mean) ** 2 for value in self._first) / len(self._first)
            self._mean = mean
