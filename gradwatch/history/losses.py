"""What the losses of a run say: the level that it began at, the present one, and what it usually stays below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.ring import Ring
from gradwatch.history.saved import FIRST_LOSSES
from gradwatch.history.statistics import median, median_and_mad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.records import Row

EARLY = 12  # losses before which there is no usual scatter yet


class LossLevels(Ring):
    """Rows, and the reference values of their losses.

    Attributes: ``reference_loss`` is the median of the first 16 finite losses, NaN before the first; ``losses`` counts the losses
    of the present task.
    """

    def __init__(self, count: int, window: int) -> None:
        super().__init__(count, window)
        self.reference_loss = math.nan
        self._first_losses: list[float] = []
        self.losses = 0
        self._harder = 0.0
        self._stuck_at, self._stuck = -1, False

    def _take_loss(self, row: Row) -> None:
        if row.has_loss:
            self.losses += 1
            if len(self._first_losses) < FIRST_LOSSES and math.isfinite(row.loss):
                self._know_first_losses([*self._first_losses, row.loss])

    def _know_first_losses(self, losses: Sequence[float]) -> None:
        self._first_losses = list(losses)
        self.reference_loss = median(np.array(self._first_losses))

    def _forget_losses(self) -> None:
        """Begin another task."""
        self.reference_loss, self._first_losses, self.losses = math.nan, [], 0
        self._harder = 0.0

    def follow_task(self) -> None:
        """The last loss is so large for its task has become harder: what comes is compared with it."""
        if math.isfinite(self.row.loss):
            self._harder = max(self._harder, abs(self.row.loss))

    def loss_level(self, window: int = 32) -> tuple[float, float]:
        """Median and scaled MAD of the losses before the last one."""
        return median_and_mad(self.task_loss(last=window + 1)[:-1])

    @property
    def least_loss(self) -> float:
        """The least of the losses kept; infinity where none was seen."""
        return float(np.fmin.reduce(self.task_loss(), initial=math.inf))

    @property
    def largest_first_loss(self) -> float:
        """The largest magnitude of the run's first 16 finite losses, and of those that a harder task has made since.

        NaN before the sixteenth.
        """
        enough = len(self._first_losses) == FIRST_LOSSES
        return max(self._harder, *map(abs, self._first_losses)) if enough else math.nan

    @property
    def stuck(self) -> bool:
        """True when at least 100 losses were seen and the last 32 lie less than a tenth below the reference loss."""
        if self._stuck_at != self.rows:
            self._stuck_at, self._stuck = self.rows, self.losses >= 100 and not self.gained(0.1, last=32)
        return self._stuck

    def gained(self, share: float, last: int = 16) -> bool:
        """True when the median of the last losses lies at least this share of the reference loss below it."""
        now, _ = median_and_mad(self.task_loss(last=last))
        return bool(self.reference_loss - now >= share * abs(self.reference_loss))

    @property
    def half_won(self) -> bool:
        """True when the median of the last 32 losses lies at half of the reference loss or below."""
        now, _ = median_and_mad(self.task_loss(last=32))
        return bool(self.reference_loss > 0 and now <= self.reference_loss / 2)

    def loss_is_rising(self) -> bool:
        """True when the median of the last 4 losses lies above what the 32 before them usually stay below.

        In the first 12 steps there is no usual scatter yet: then it must have doubled since the first. Where no loss is
        seen nothing speaks for the run: True. A loss below a tenth of the reference loss is not worth the word.
        """
        if not self._first_losses:
            return True
        if self.losses < EARLY:
            return not self.row.loss <= self._first_losses[0] + abs(self._first_losses[0])
        now, _ = median_and_mad(self.task_loss(last=4))
        return not (0 <= now < self.reference_loss / 10 or min(now, self.row.loss) <= self.loss_ceiling(last=4))

    def next_loss_ceiling(self) -> float:
        """What the coming loss should stay below, as in `loss_is_rising`; minus infinity where none is seen."""
        if not self._first_losses:
            return -math.inf
        if self.losses < EARLY:
            return self._first_losses[0] + abs(self._first_losses[0])
        return self.loss_ceiling(last=0)

    def loss_ceiling(self, last: int) -> float:
        """What the 32 losses before the ``last`` ones usually stay below; NaN where there are none.

        The highest of: nine in ten of them; their median and three scaled MADs; their median and a tenth of it.
        """
        before = self.task_loss(last=32 + last)
        before = before[: len(before) - last]
        before = before[np.isfinite(before)]
        middle, scatter = median_and_mad(before)
        return (
            max(float(np.quantile(before, 0.9)), middle + max(3 * scatter, abs(middle) / 10))
            if before.size
            else math.nan
        )
