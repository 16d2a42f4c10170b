"""A series as one line of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradwatch.records import Floats

BLOCKS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"


def sparkline(values: Floats, width: int) -> str:
    """Return at most ``width`` blocks for the last values, on a log scale where all are positive.

    More values than blocks are put into bins, each shown by its largest value. A bin with NaN or Inf shows ``×``.

    >>> import numpy as np
    >>> sparkline(np.array([1.0, 10.0, 100.0, np.nan]), 10)
    '▁▅█×'
    """
    if not len(values) or width < 1:
        return ""
    bins = np.array_split(values, min(width, len(values)))
    largest = np.array([part.max() for part in bins])  # NaN wins, on purpose
    finite = np.isfinite(largest)
    shown = largest[finite]
    if (shown > 0).all():
        largest = np.where(finite, np.log(np.where(finite, largest, 1.0)), np.nan)
        shown = largest[finite]
    low, high = (shown.min() / 2, shown.max() / 2) if shown.size else (0.0, 0.0)  # halves: their span cannot overflow
    span = high - low or 1.0
    return "".join(
        BLOCKS[round((value / 2 - low) / span * (len(BLOCKS) - 1))] if ok else NOT_FINITE
        for value, ok in zip(largest, finite, strict=True)
    )
