"""The rows of each optimizer, for trainings in which several optimizers step by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import median_and_mad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Floats


_LEVEL = 32  # losses of an optimizer whose median is their level
_TURNS = 3  # times that optimizers have returned within twice as many rows, if they take turns
_SAME = 0.1  # share by which levels may differ that are those of one loss


@dataclass(frozen=True)
class OptimizerRows:
    """The rows of one optimizer, of those that are kept.

    Attributes:
        history: the history.
        held: whether it holds each layer, and the layer is trainable, shape (L,).
        places: places of its rows, oldest first; None: all.
    """

    history: History
    held: NDArray[np.bool_]
    places: NDArray[np.intp] | None = None

    def last(self, count: int | None = None) -> Floats:
        """Return the last norms of all layers, shape (n, L)."""
        if self.places is None:
            return self.history.grad_norm(last=count)
        return self.history.grad_norm_at(self.places[-count if count else None :])

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps of the rows."""
        return self.history.steps() if self.places is None else self.history.steps()[self.places]

    @property
    def losses(self) -> Floats:
        """The losses of the rows."""
        return self.history.loss() if self.places is None else self.history.loss()[self.places]

    @property
    def share(self) -> float:
        """Share of the rows."""
        return 1.0 if self.places is None else len(self.places) / len(self.history.steps())


def rows_by_optimizer(history: History, last: int) -> list[OptimizerRows]:
    """Return the rows of each optimizer that has made one of the ``last`` rows, that of the last row first."""
    turns = history.holders.turns(history.rows, last)
    if not turns:
        return [OptimizerRows(history, np.isfinite(history.rate))]
    return [OptimizerRows(history, held, places) for held, places in turns]


def with_losses_of_their_own(history: History) -> list[OptimizerRows]:
    """Return the rows of each of several optimizers that take turns with losses of different levels; nothing if none do.

    Parts of a model that are frozen by turns, for longer, have one loss.
    """
    parts = rows_by_optimizer(history, 2 * _LEVEL)
    if len(parts) == 1:
        return []
    first = len(history.steps()) - 2 * _LEVEL
    changes = sum(
        np.count_nonzero(np.diff(part.places[part.places >= first]) > 1) for part in parts if part.places is not None
    )
    if changes < _TURNS:
        return []
    levels = [median_and_mad(part.losses[-_LEVEL:])[0] for part in parts]
    return parts if max(levels) - min(levels) > _SAME * max(map(abs, levels)) else []


def places_of(history: History, held: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    """Return the places of the kept rows of the current task that the optimizer which holds ``held`` has made; None: of all."""
    count = len(history.steps())
    first = max(0, count - history.task_rows)
    if held is None:
        return np.arange(first, count)
    parts = rows_by_optimizer(history, history.window)
    mine = next((part for part in parts if np.array_equal(part.held, held)), None)
    if mine is None:
        return np.zeros(0, dtype=np.intp)
    return np.arange(first, count) if mine.places is None else mine.places[mine.places >= first]
