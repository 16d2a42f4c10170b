"""The ring of the last rows. Missing values are NaN; every view is read-only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradwatch.history.columns import widened
from gradwatch.history.statistics import quiet_numpy
from gradwatch.records import Provenance, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats

_BUDGET = 16 * 2**20  # bytes of ring; 1,024 rows of 300 layers take 5 MB


class Copied(NamedTuple):
    """Rows as they stood in the ring, oldest first: (n,) each, and (n, L)."""

    steps: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    coefficient: Floats
    skipped: NDArray[np.bool_]
    grad_norm: Floats


class Ring:
    """The last ``window`` rows of ``count`` layers.

    Args:
        count: layers.
        window: rows to keep; fewer when there are so many layers that they would take over 16 MB.

    Attributes: ``rows`` counts the rows so far.
    """

    def __init__(self, count: int, window: int) -> None:
        self.window = max(64, min(window, _BUDGET // (16 * max(count, 1))))
        self.rows = 0
        self._task = 0  # the row at which the present task began
        self._grad = np.full((self.window, count), np.nan)
        self._weight = np.full((self.window, count), np.nan)
        self._loss = np.full(self.window, np.nan)
        self._norm = np.full(self.window, np.nan)
        self._coefficient = np.full(self.window, np.nan)
        self._skipped = np.zeros(self.window, dtype=bool)
        self._step = np.full(self.window, -1, dtype=np.int64)
        self._normed = 0  # rows whose global norm is known
        self._row = Row(-1, math.nan, np.full(count, np.nan), math.nan)
        self._row_is_last = True

    def _push_row(self, row: Row) -> int:
        """Keep a row; return its slot."""
        self._add_norms()
        slot = self._put(row.step, row.loss, row.grad_norm)
        self._row, self._row_is_last, self._normed = row, True, self.rows
        self._norm[slot] = row.global_norm
        self._coefficient[slot] = row.applied
        self._weight[slot] = np.nan if row.weight_norm is None else row.weight_norm
        return slot

    def _note_row(self, step: int, loss: float, grad_norm: Floats, applied: float) -> None:
        """Keep a row that is like the last one but for these numbers; its global norm is computed when it is asked for."""
        slot = self._put(step, loss, grad_norm)
        self._row_is_last = False
        self._coefficient[slot] = applied
        self._weight[slot] = np.nan

    def _widen(self, count: int) -> None:
        """Make room for ``count`` layers; the past of new ones is missing."""
        self._grad = widened(self._grad, count, np.nan)
        self._weight = widened(self._weight, count, np.nan)
        self._row = self.row._replace(grad_norm=widened(self.row.grad_norm, count, np.nan))

    def _add_norms(self) -> None:
        """Compute the global norms of the noted rows, which nobody has asked for yet."""
        if self._normed < self.rows:
            slots = np.arange(self._normed, self.rows) % self.window
            self._norm[slots] = np.sqrt(np.nansum(np.square(self._grad[slots]), axis=1))
            self._normed = self.rows

    def _put(self, step: int, loss: float, grad_norm: Floats) -> int:
        slot = self.rows % self.window
        self._grad[slot] = grad_norm
        self._loss[slot] = loss
        self._skipped[slot] = False
        self._step[slot] = step
        self.rows += 1  # last: another thread may read
        return slot

    def amend(self, *, coefficient: float, skipped: bool = False) -> None:
        """Record on the last row what was done to its gradients."""
        slot = (self.rows - 1) % self.window
        self._coefficient[slot] *= coefficient
        self._skipped[slot] = skipped

    def copied(self, first: int, until: int) -> Copied:
        """Return the rows of the numbers from ``first`` to before ``until``; the run's first row has the number 0.

        They must still be kept. Nothing is changed, so that another thread may ask.
        """
        numbers = np.arange(first, until)
        slots = numbers % self.window
        grad_norm, norm = self._grad[slots], self._norm[slots]
        missing = numbers >= self._normed
        with quiet_numpy():
            norm[missing] = np.sqrt(np.nansum(np.square(grad_norm[missing]), axis=1))
        return Copied(
            self._step[slots], self._loss[slots], norm, self._coefficient[slots], self._skipped[slots], grad_norm
        )

    @property
    def row(self) -> Row:
        """The last row."""
        if not self._row_is_last:
            self._add_norms()
            slot = (self.rows - 1) % self.window
            last = self._row
            self._row_is_last = True
            self._row = Row(
                step=int(self._step[slot]),
                loss=float(self._loss[slot]),
                grad_norm=self._grad[slot].copy(),
                global_norm=float(self._norm[slot]),
                rate=last.rate,
                family=last.family,
                applied=float(self._coefficient[slot]),
                arrived=last.arrived,
                provenance=last.provenance,
            )
        return self._row

    def _last(self, ring: NDArray[Any], last: int | None) -> NDArray[Any]:
        kept = min(self.rows, self.window)
        count = kept if last is None else min(last, kept)
        end = self.rows % self.window
        view = ring[end - count : end] if end - count >= 0 else np.concatenate([ring[end - count :], ring[:end]])
        view.flags.writeable = False
        return view

    def grad_norm(self, last: int | None = None) -> Floats:
        """Gradient norms, shape (n, L), oldest first; as measured, before any clip of auto-clip."""
        return self._last(self._grad, last)

    def weight_norm(self, last: int | None = None) -> Floats:
        """Weight norms before the step's update, shape (n, L), oldest first; NaN where none was sampled."""
        return self._last(self._weight, last)

    def loss(self, last: int | None = None) -> Floats:
        """Losses, shape (n,), oldest first; NaN where none was seen."""
        return self._last(self._loss, last)

    def global_norm(self, last: int | None = None) -> Floats:
        """L2 norms of all gradients as one vector, shape (n,), oldest first."""
        self._add_norms()
        return self._last(self._norm, last)

    def clip_coefficient(self, last: int | None = None) -> Floats:
        """Norm after clipping over norm before it, shape (n,), oldest first; 1.0 where nothing was clipped."""
        return self._last(self._coefficient, last)

    def skipped(self, last: int | None = None) -> NDArray[np.bool_]:
        """Whether auto-clip skipped the optimizer step, shape (n,), oldest first."""
        return self._last(self._skipped, last)

    def steps(self, last: int | None = None) -> NDArray[np.int64]:
        """The optimizer steps of the rows, shape (n,), oldest first."""
        return self._last(self._step, last)

    @property
    def task_rows(self) -> int:
        """The rows since layers were last added or replaced, which makes it another task; those since the start before that."""
        return self.rows - self._task

    def task_loss(self, last: int | None = None) -> Floats:
        """Losses of the present task, shape (n,), oldest first: a new head has nothing to do with the losses before it."""
        return self.loss(last=self.task_rows if last is None else min(last, self.task_rows))

    @property
    def provenance(self) -> Provenance:
        """Where the last row's numbers come from."""
        return self.row.provenance

    @property
    def loss_nonfinite(self) -> bool:
        """True when the last row has a loss and it is NaN or infinite."""
        return self.row.loss_nonfinite
