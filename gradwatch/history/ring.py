"""The ring buffer of the last rows. Missing values are NaN, and every view is read-only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.history.columns import widened
from gradwatch.history.holders import Holders
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import Provenance, Row, Scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gradwatch.records import Floats

_BUDGET = 16 * 2**20  # bytes of ring; 1,024 rows of 300 layers take 5 MB


class Ring:
    """The last ``window`` rows of ``count`` layers.

    Args:
        count: number of layers.
        window: number of rows to keep. Fewer are kept (at least 64) if they would take over 16 MB.

    Attributes:
        rows: number of rows so far.
        window: number of rows that are kept.
        holders: what the optimizer of each row held.
        explosions: the first and the last step of each explosion so far that was more than a notice.
        destructive: those of them whose rows never become a reference for what is usual.
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
        self._learning_rate = np.full(self.window, np.nan)
        self._loss_scale = np.full(self.window, np.nan)
        self.holders = Holders(count, self.window)
        self.explosions: Sequence[tuple[int, int]] = ()
        self.destructive: Sequence[tuple[int, int]] = ()
        self._rates: Floats | None = None  # of the last row, and the largest of them
        self._largest_rate = math.nan
        self._step = np.full(self.window, -1, dtype=np.int64)
        self._normed = 0  # rows whose global norm is known
        self._row = Row(-1, math.nan, np.full(count, np.nan), math.nan)
        self._row_is_last = True

    def _push_row(self, row: Row) -> int:
        """Add a row and return its slot."""
        self._add_norms()
        if row.rate is not self._rates:
            self._rates, self._largest_rate = row.rate, _largest(row.rate)
            self.holders.follow(self.rows, row.rate)
        slot = self._put(row.step, row.loss, row.grad_norm, self._largest_rate)
        self._row, self._row_is_last, self._normed = row, True, self.rows
        self._norm[slot] = row.global_norm
        self._coefficient[slot] = row.applied
        self._weight[slot] = np.nan if row.weight_norm is None else row.weight_norm
        self._loss_scale[slot] = row.loss_scale
        return slot

    def _note_row(self, step: int, loss: float, grad_norm: Floats, applied: float, rate: float) -> None:
        """Add a row that equals the last one except for the given values; its global norm is computed on request."""
        slot = self._put(step, loss, grad_norm, rate)
        self._row_is_last = False
        self._coefficient[slot] = applied
        self._weight[slot] = np.nan
        self._loss_scale[slot] = np.nan

    def _widen(self, count: int) -> None:
        """Extend the ring to ``count`` layers; past values of new ones are missing."""
        self._grad = widened(self._grad, count, np.nan)
        self._weight = widened(self._weight, count, np.nan)
        self.holders.widen(count)
        self._row = self.row._replace(grad_norm=widened(self.row.grad_norm, count, np.nan))

    def _add_norms(self) -> None:
        """Compute the global norms of the noted rows that do not have one yet."""
        if self._normed < self.rows:
            slots = np.arange(self._normed, self.rows) % self.window
            self._norm[slots] = np.sqrt(np.nansum(np.square(self._grad[slots]), axis=1))
            self._normed = self.rows

    def _put(self, step: int, loss: float, grad_norm: Floats, rate: float) -> int:
        slot = self.rows % self.window
        self._grad[slot] = grad_norm
        self._loss[slot] = loss
        self._learning_rate[slot] = rate
        self._skipped[slot] = False
        self._step[slot] = step
        self.rows += 1  # last: another thread may read
        return slot

    def amend(self, *, coefficient: float, skipped: bool = False) -> None:
        """Record in the last row what was done to its gradients."""
        slot = (self.rows - 1) % self.window
        self._coefficient[slot] *= coefficient
        self._skipped[slot] = skipped

    def copied(self, first: int, until: int) -> tuple[Scalars, Floats]:
        """Return copies of the rows with numbers in ``range(first, until)``, and of their gradient norms, shape (n, L).

        The first row of the run has number 0. The rows must still be kept. Nothing is changed, so another thread may call this.
        """
        numbers = np.arange(first, until)
        slots = numbers % self.window
        grad_norm, norm = self._grad[slots], self._norm[slots]
        missing = numbers >= self._normed
        with ignore_fp_warnings():
            norm[missing] = np.sqrt(np.nansum(np.square(grad_norm[missing]), axis=1))
        return self._scalars(slots, norm), grad_norm

    def scalars(self, first: int, until: int) -> Scalars:
        """Return copies of the scalars of the rows with numbers in ``range(first, until)``, which must still be kept."""
        self._add_norms()
        slots = np.arange(first, until) % self.window
        return self._scalars(slots, self._norm[slots])

    def _scalars(self, slots: NDArray[np.int64], norm: Floats) -> Scalars:
        return Scalars(
            step=self._step[slots],
            loss=self._loss[slots],
            global_norm=norm,
            clip_coefficient=self._coefficient[slots],
            skipped=self._skipped[slots],
            learning_rate=self._learning_rate[slots],
            loss_scale=self._loss_scale[slots],
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
        """Return the gradient norms as measured, before auto-clip, shape (n, L), oldest first."""
        return self._last(self._grad, last)

    def grad_norm_at(self, places: NDArray[np.intp]) -> Floats:
        """Return the gradient norms of some of the rows that are kept, by their places in `grad_norm`, shape (n, L)."""
        rows: Floats = self._grad[(max(0, self.rows - self.window) + places) % self.window]
        return rows

    def weight_norm(self, last: int | None = None) -> Floats:
        """Return the weight norms before the update of each step, shape (n, L), oldest first; NaN where not sampled."""
        return self._last(self._weight, last)

    def loss(self, last: int | None = None) -> Floats:
        """Return the losses, shape (n,), oldest first; NaN where none was seen."""
        return self._last(self._loss, last)

    def global_norm(self, last: int | None = None) -> Floats:
        """Return the L2 norms of all gradients as one vector, shape (n,), oldest first."""
        self._add_norms()
        return self._last(self._norm, last)

    def clip_coefficient(self, last: int | None = None) -> Floats:
        """Return the norms after clipping divided by those before, shape (n,), oldest first; 1.0 where nothing was clipped."""
        return self._last(self._coefficient, last)

    def skipped(self, last: int | None = None) -> NDArray[np.bool_]:
        """Return whether auto-clip skipped the optimizer step, shape (n,), oldest first."""
        return self._last(self._skipped, last)

    def learning_rate(self, last: int | None = None) -> Floats:
        """Return the largest learning rate of each step's optimizer, shape (n,), oldest first; NaN where it is not known."""
        return self._last(self._learning_rate, last)

    def loss_scale(self, last: int | None = None) -> Floats:
        """Return the factors of the gradient scaler, shape (n,), oldest first; NaN for steps that no scaler made."""
        return self._last(self._loss_scale, last)

    def steps(self, last: int | None = None) -> NDArray[np.int64]:
        """Return the optimizer steps of the rows, shape (n,), oldest first."""
        return self._last(self._step, last)

    def know_explosions(self, explosions: Sequence[tuple[int, int]], destructive: Sequence[tuple[int, int]]) -> None:
        """Set the `explosions` of the run so far, and the `destructive` ones."""
        self.explosions, self.destructive = explosions, destructive

    def outside(self, explosions: Sequence[tuple[int, int]], last: int | None = None) -> NDArray[np.bool_]:
        """Return whether each row is outside of the given explosions, shape (n,)."""
        steps = self.steps(last)
        outside = np.ones(len(steps), dtype=bool)
        for start, end in (one for one in explosions if len(steps) and one[1] >= steps[0]):
            outside &= (steps < start) | (steps > end)
        return outside

    @property
    def task_rows(self) -> int:
        """The number of rows of the current task (see `History.begin_task`), which began with the run if there was no other."""
        return self.rows - self._task

    @property
    def last_step_before_task(self) -> int:
        """The step of the row before the current task, or of the oldest that is kept."""
        return int(self.steps(last=self.task_rows + 1)[0])

    def task_loss(self, last: int | None = None) -> Floats:
        """Return the losses of the current task, shape (n,), oldest first: those before a new head say nothing about it."""
        return self.loss(last=self.task_rows if last is None else min(last, self.task_rows))

    @property
    def provenance(self) -> Provenance:
        """The origin of the values of the last row."""
        return self.row.provenance

    @property
    def loss_nonfinite(self) -> bool:
        """True if the last row has a loss and it is NaN or infinite."""
        return self.row.loss_nonfinite


def _largest(rates: Floats | None) -> float:
    """Return the largest of the learning rates that are known; NaN if none is."""
    return math.nan if rates is None else float(np.fmax.reduce(rates, initial=math.nan))
