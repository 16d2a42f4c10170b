"""The typical global norm of a run. The threshold of auto-clip and the suggested threshold are multiples of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.recurrence import usual_size

if TYPE_CHECKING:
    from gradwatch.records import Floats

LEAST_NORMS = 16  # norms needed for a typical one
PAST = 256  # newest norms that are considered
_STRETCH = 32  # norms in each stretch whose median is taken


def typical_norm(norms: Floats) -> float:
    """Return the typical value of a run's global norms, shape (n,), oldest first; NaN if fewer than 16 are finite and not zero.

    The smallest median of a stretch of about 32 among the last 256 norms: the newest stretch if norms fall as the run learns,
    the one before they grew if they already grow. If larger norms recur, half of their usual peak if that is more (see
    `gradwatch.history.recurrence`).
    """
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if norms.size < LEAST_NORMS:
        return math.nan
    recent = norms[-PAST:]
    stretches = np.array_split(recent, max(1, recent.size // _STRETCH))
    return usual_size(norms, min(float(np.median(stretch)) for stretch in stretches))
