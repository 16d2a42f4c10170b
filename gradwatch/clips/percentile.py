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
    """Clip by global norm, to a percentile of the run's own norms: AutoClip's way.

    ``max_norm = percentile(||g_1|| ... ||g_t||)``, over the norms before clipping that the history keeps (the last 1,024;
    fewer in models of thousands of layers). Norms that are not finite are left out. Source: Seetharaman et al., "AutoClip:
    adaptive gradient clipping for source separation networks" (2020), arXiv:2007.14469.
    """

    percentile: float = Field(default=90.0, gt=0, le=100)

    def __init__(self, percentile: float = 90.0, **settings: Any) -> None:
        super().__init__(percentile=percentile, **settings)

    def baseline(self) -> Baseline:
        """See `Clip.baseline`."""
        return _Percentile(self.percentile)


class _Percentile:
    """The history is memory enough."""

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile

    def clip(self, history: History, rows: int) -> ClipNorm | None:  # noqa: ARG002  this row's norm is one of them
        """See `Baseline`."""
        norms = history.global_norm()
        norms = norms[np.isfinite(norms)]
        bound = float(np.percentile(norms, self._percentile)) if norms.size else 0.0
        return ClipNorm(bound) if bound > 0 else None
