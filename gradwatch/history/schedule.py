"""How often all rules judge, how far the rows in between may go unjudged, and the time that watching takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats

_SETTLED = 512  # rows after which a run that is well is looked at half as often


def cadence(row: int) -> int:
    """Return every how many rows all rules judge and the weights are sampled, while nothing stirs, ``row`` rows in."""
    return 16 if row < _SETTLED else 32


@dataclass(slots=True)
class OwnTime:
    """The time that watching has taken so far, in seconds."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the coming rows may be and still go unjudged.

    Args:
        history: what they are noted in.
        rows: how many they may be.
        grad_norm: their largest gradient norms, shape (L,).
        loss: their largest loss.
        until: when a report is due, in seconds of `perf_counter`.
    """

    history: History
    rows: int
    grad_norm: Floats
    loss: float
    until: float = math.inf
