"""A series of values as one line of block characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradwatch.records import Floats

BLOCKS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"


def sparkline(values: Floats, width: int) -> str:
    """Return the values as at most ``width`` block characters, on a log scale if all finite values are positive.

    If there are more values than blocks, each block shows the largest value of a bin. A bin with NaN or Inf shows ``×``.

    >>> import numpy as np
    >>> sparkline(np.array([1.0, 10.0, 100.0, np.nan]), 10)
    '▁▅█×'
    """
    if not len(values) or width < 1:
        return ""
    bins = np.array_split(values, min(width, len(values)))
    largest = np.array([part.max() for part in bins])  # NaN propagates, on purpose
    finite = np.isfinite(largest)
    shown = largest[finite]
    if (shown > 0).all():
        largest = np.where(finite, np.log(np.where(finite, largest, 1.0)), np.nan)
        shown = largest[finite]
    low, high = (shown.min() / 2, shown.max() / 2) if shown.size else (0.0, 0.0)  # halved: the span cannot overflow
    span = high - low or 1.0
    return "".join(
        BLOCKS[round((value / 2 - low) / span * (len(BLOCKS) - 1))] if ok else NOT_FINITE
        for value, ok in zip(largest, finite, strict=True)
    )
