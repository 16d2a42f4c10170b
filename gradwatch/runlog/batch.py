"""What the training hands to the thread that writes: everything since the last time, in one piece."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradwatch.runlog.thinning import EACH

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gradwatch.records import Alarm, Facts, Floats, Row, Snapshot


@dataclass
class Batch:
    """``n`` rows of ``L`` layers, and what was said about them.

    ``gradient`` is (n, L) float32, or holds only the rows at ``places``, because the disk is too slow. ``special`` holds the
    rows that did not go the short way, by their place among the ``n``: what they know beyond these arrays. ``columns``
    describes all layers, when some are new: name, elements, matrix, fan-in. A flight is step, reason and record. ``again``:
    the run goes back, and its rows from here on are a session of their own.
    """

    time: float
    steps: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    coefficient: Floats
    skipped: NDArray[np.bool_]
    gradient: NDArray[np.float32]
    places: Sequence[int] | None = None
    special: list[tuple[int, Row]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    snapshot: Snapshot | None = None
    facts: Facts | None = None
    order: NDArray[np.intp] | None = None
    columns: list[tuple[str, int, int, int]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    flights: list[tuple[int, str, str]] = field(default_factory=list)
    again: bool = False

    def thin(self) -> None:
        """Keep the numbers of each layer for each eighth row only, those that are kept longest."""
        self.places = [place for place, step in enumerate(self.steps.tolist()) if (step + 1) % EACH == 0]
        self.gradient = self.gradient[self.places]
        kept = set(self.places)
        self.special = [(place, row) for place, row in self.special if place in kept]

    def less(self) -> tuple[Batch, Batch]:
        """Return what to write where something in it cannot be: all about its rows without what was said, the bare rows."""
        rows = replace(self, alarms=[], snapshot=None, notes=[], flights=[], facts=None, order=None)
        return rows, replace(rows, special=[])

    @property
    def nbytes(self) -> int:
        """What it takes in memory, about."""
        return (
            64 * len(self.steps) + self.gradient.nbytes + sum(8 * row.grad_norm.nbytes for _, row in self.special) // 2
        )
