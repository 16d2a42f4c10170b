"""The usual sizes of a run's gradient norms, and how long layers were without a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.losses import LossLevels
from gradwatch.history.statistics import Typical, ignore_fp_warnings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats

ABSENT = 49  # rows of its optimizer without a gradient after which a layer is no longer idle
_LEAST = 0.01  # share of the usual norm of all layers below which that of one says nothing of the run
SETTLED = 8  # norms that a layer needs before it has a typical one


class GradientNorms(LossLevels):
    """The ring of rows and its losses, with the reference values of their gradient norms.

    Attributes:
        sizes: number of elements per layer, shape (L,).
        matrices: whether each layer has two or more dimensions, shape (L,).
        weight_of: column of the weight that each bias or gain belongs to, shape (L,); -1 where there is none.
        nonfinite: what is not finite in each layer's last gradient, shape (L,) (see `gradwatch.records.NonFinite`).
        typical_weight: the typical weight norm of each layer.
    """

    sizes: Floats
    matrices: NDArray[np.bool_]
    weight_of: NDArray[np.intp]
    nonfinite: NDArray[np.uint8]
    typical_weight: Typical

    def __init__(self, count: int, window: int) -> None:
        super().__init__(count, window)
        self._forget_norms(count)

    def _forget_norms(self, count: int) -> None:
        """Forget what is usual: nothing is known of the gradients of a new task."""
        self._learned = self._to_learn = self.rows
        self._typical_grad = Typical(count, half_life=64)
        self._largest_grad, self._loss_at_largest = np.full((2, count), np.nan)
        self._absence = self._longest_absence = np.zeros(count, dtype=np.int64)

    def learn(self) -> None:
        """Update the typical values with the last row. Called after the rules have judged it.

        Gradient norms are queued, and processed in one batch when their typical values are requested.
        """
        self._to_learn = self.rows
        if self.row.weight_norm is not None:
            with ignore_fp_warnings():
                self.typical_weight.update(self.row.weight_norm)
        if self._to_learn - self._learned >= self.window // 2:
            self._catch_up()

    @property
    def typical_grad(self) -> Typical:
        """The typical gradient norm of each layer, not including the row that is being judged."""
        if self._learned < self._to_learn:
            self._catch_up()
        return self._typical_grad

    def _catch_up(self) -> None:
        slots = np.arange(self._learned, self._to_learn) % self.window
        self._learned = self._to_learn
        with ignore_fp_warnings():
            self._typical_grad.update_all(self._grad[slots])
            came = self._grad[slots] > 0
            self._follow_absences(came)
            self._follow_largest(came, self._loss[slots])

    def _follow_largest(self, came: NDArray[np.bool_], losses: Floats) -> None:
        """Follow the largest typical norm of each layer, and the loss of its rows then: ``came`` (n, L), ``losses`` (n,)."""
        typical = self._typical_grad
        larger = (typical.seen >= SETTLED) & ~(typical.value <= self._largest_grad)
        if larger.any():
            told = came & np.isfinite(losses)[:, None]
            larger &= told.any(axis=0)
            told = told[:, larger]
            self._largest_grad = np.where(larger, typical.value, self._largest_grad)
            self._loss_at_largest[larger] = np.nan_to_num(losses) @ told / told.sum(axis=0)

    def _follow_absences(self, came: NDArray[np.bool_]) -> None:
        """Follow how long layers are without a gradient above zero; ``came``, (n, L): whether each of the next rows has one."""
        if came.all() and not self._absence.any():
            return
        places = np.arange(1, len(came) + 1)[:, None]
        # place of the newest row with a gradient, 0 or less if it is before these
        latest = np.maximum.accumulate(np.where(came, places, -self._absence), axis=0)
        before = np.vstack([-self._absence, latest[:-1]])
        ended = np.max(np.where(came, places - before - 1, 0), axis=0, initial=0)
        self._longest_absence = np.maximum(self._longest_absence, ended)
        self._absence = (len(came) - latest[-1]) if len(came) else self._absence

    @property
    def largest_typical(self) -> tuple[Floats, Floats]:
        """The largest typical gradient norm of each layer so far, and the mean loss of the rows then, (L,); NaN if unknown."""
        if self._learned < self._to_learn:
            self._catch_up()
        return self._largest_grad, self._loss_at_largest

    @property
    def longest_absence(self) -> NDArray[np.int64]:
        """The most rows in a row in which each layer had no gradient above zero, of absences that are over, shape (L,)."""
        if self._learned < self._to_learn:
            self._catch_up()
        return self._longest_absence

    @property
    def usual_grad(self) -> Floats:
        """The typical gradient norm of each layer, at least a hundredth of that of all layers of the last row together, (L,).

        A gradient that is next to nothing beside the others may grow a thousandfold while a run learns, as in a branch that
        begins at a scale of 1e-6.
        """
        typical = self.typical_grad.value
        whole = math.sqrt(np.nansum(np.square(np.where(self.row.grad_norm > 0, typical, 0.0))))
        return np.where(typical < _LEAST * whole, _LEAST * whole, typical)  # NaN stays

    def surge(self) -> Floats:
        """Return the last gradient norms divided by `usual_grad`, shape (L,).

        NaN for layers whose gradient is not finite, and where `has_usual` is false.
        """
        ratio: Floats = self.row.grad_norm / self.usual_grad
        ratio[~self.has_usual | (self.nonfinite > 0)] = np.nan
        return ratio

    @property
    def has_usual(self) -> NDArray[np.bool_]:
        """True for layers with at least 8 norms so far, except biases beside such a weight, shape (L,).

        The gradient of a bias is a sum. Before a normalisation, its addends cancel: it is rounding noise until that is frozen or
        removed. The gradient of its weight shows how large they are, unless it has had none for 49 rows.
        """
        settled = self.typical_grad.seen >= SETTLED
        beside = (self.weight_of >= 0) & (settled & (self._absence < ABSENT))[self.weight_of]
        return settled & ~beside

    def typical_elements(self) -> Floats:
        """Return the typical size of a gradient element of each matrix that has a gradient, shape (L,); NaN if unknown."""
        told = (self.typical_grad.seen >= SETTLED) & self.matrices & (self.row.grad_norm > 0)
        return np.where(told, self.typical_grad.value / np.sqrt(self.sizes), np.nan)
