"""Clip by a percentile of past norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from gradwatch.clips.base import Baseline, FromHistory
from gradwatch.clips.norm import ClipNorm

if TYPE_CHECKING:
    from gradwatch.history.history import History


class ClipPercentile(FromHistory):
    """Clip by global norm to a percentile of the run's own norms, as AutoClip does.

    ``max_norm = percentile(||g_1|| ... ||g_t||)`` over the norms before clipping that the history keeps (the last 1,024, or
    fewer in models with over a thousand layers). Norms that are not finite are ignored. Source: Seetharaman et al., "AutoClip:
    adaptive gradient clipping for source separation networks" (2020), arXiv:2007.14469.
    """

    percentile: float = Field(default=90.0, gt=0, le=100)

    def __init__(self, percentile: float = 90.0, **settings: Any) -> None:
        super().__init__(percentile=percentile, **settings)

    def baseline(self) -> Baseline:
        return _Percentile(self.percentile)


class _Percentile:
    """A baseline without state of its own, since the history keeps the norms."""

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile

    def clip(self, history: History, rows: int) -> ClipNorm | None:  # noqa: ARG002  the current row counts too
        norms = history.global_norm()
        norms = norms[np.isfinite(norms)]
        bound = float(np.percentile(norms, self._percentile)) if norms.size else 0.0
        return ClipNorm(bound) if bound > 0 else None
