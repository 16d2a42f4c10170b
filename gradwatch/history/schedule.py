"""How often all rules judge, and the bounds within which rows in between are not judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats

_SETTLED = 512  # rows after which a healthy run is judged half as often


def cadence(row: int) -> int:
    """Return the number of rows between full judgements and samples of the weights in a healthy run, after ``row`` rows."""
    return 16 if row < _SETTLED else 32


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds within which the coming rows need not be judged.

    Args:
        history: the history in which they are noted.
        rows: the largest number of such rows.
        grad_norm: the largest gradient norms, shape (L,).
        loss: the largest loss.
        until: the time at which a report is due, in seconds of `perf_counter`.
    """

    history: History
    rows: int
    grad_norm: Floats
    loss: float
    until: float = math.inf
