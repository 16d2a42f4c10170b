"""The batch that the training passes to the writer thread: everything that is new since the previous batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradwatch.runlog.thinning import EACH

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gradwatch.records import Alarm, Facts, Row, Scalars, Snapshot


@dataclass
class Batch:
    """``n`` rows of ``L`` layers, with the alarms, the snapshot and the notes that belong to them.

    Attributes:
        gradient: gradient norms, float32 of shape (n, L); only of the rows at ``places`` after `thin`.
        places: indices of the rows that have gradient norms; None: all rows have.
        special: rows that did not take the fast path, each with its index among the ``n``, for what the arrays do not hold.
        columns: name, elements, whether it is a matrix, and fan-in of every layer; empty if no layer is new.
        flights: step, reason and record of each call of the flight recorder.
        again: whether the run has gone back to an earlier step, so that the rows from here on form a new session.
    """

    time: float
    scalars: Scalars
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

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps of the rows, shape (n,)."""
        return self.scalars.step

    def thin(self) -> None:
        """Drop the norms of the layers, except those of every eighth row, which are also kept longest in the file."""
        self.places = [place for place, step in enumerate(self.steps.tolist()) if (step + 1) % EACH == 0]
        self.gradient = self.gradient[self.places]
        kept = set(self.places)
        self.special = [(place, row) for place, row in self.special if place in kept]

    def less(self) -> tuple[Batch, Batch]:
        """Return two reduced batches, to try in turn if this one cannot be written.

        The first has the rows without alarms, notes and records, the second only the arrays of the rows.
        """
        rows = replace(self, alarms=[], snapshot=None, notes=[], flights=[], facts=None, order=None)
        return rows, replace(rows, special=[])

    @property
    def nbytes(self) -> int:
        """The approximate size in memory, in bytes."""
        return (
            64 * len(self.steps) + self.gradient.nbytes + sum(8 * row.grad_norm.nbytes for _, row in self.special) // 2
        )
