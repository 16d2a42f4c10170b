"""The typical norm of a run: auto-clip's threshold and the suggested one are multiples of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.recurrence import usual_size

if TYPE_CHECKING:
    from gradwatch.records import Floats

LEAST_NORMS = 16  # before which there is no typical one
_PAST = 256  # norms among which it is looked for,
_STRETCH = 32  # in stretches of as many


def typical_norm(norms: Floats) -> float:
    """Return the typical one of a run's global norms, shape (n,), oldest first; NaN if fewer than 16 are finite and not zero.

    Of the last 256 norms the calmest stretch: the smallest of the medians of 32 in a row. Where norms fall as the run learns
    that is the newest one, where they already grow the one before they did. Where larger norms come again and again it is
    half of what they reach (`gradwatch.history.recurrence`).
    """
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if norms.size < LEAST_NORMS:
        return math.nan
    recent = norms[-_PAST:]
    stretches = np.array_split(recent, max(1, recent.size // _STRETCH))
    return usual_size(norms, min(float(np.median(stretch)) for stretch in stretches))
