"""The rows of each optimizer, for trainings in which several optimizers step by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Floats


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
