"""Reference values of a run's losses: the level at which it began, the current level, and its usual upper bound."""

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

EARLY = 12  # losses needed before their scatter is known
APART = "several optimizers take turns with losses of their own, which have no level together"
_NEAR = 8  # losses on either side of a step that are compared


class LossLevels(Ring):
    """The ring of rows, with the reference values of their losses.

    Attributes:
        reference_loss: median of the first 16 finite losses of the current task; NaN before the first.
        losses: number of losses of the current task.
        lost_since: step since which each loss was NaN or infinite; None if the last one is finite, or none was seen.
        resting: why the loss need not fall, as a clause; "" while rules may expect it to.
    """

    def __init__(self, count: int, window: int) -> None:
        super().__init__(count, window)
        self.reference_loss = math.nan
        self._first_losses: list[float] = []
        self.losses = 0
        self.lost_since: int | None = None
        self.resting = ""
        self._harder = 0.0
        self._stuck_at, self._stuck = -1, False

    def _take_loss(self, row: Row) -> None:
        if row.has_loss:
            self.losses += 1
            self.lost_since = (
                None if math.isfinite(row.loss) else row.step if self.lost_since is None else self.lost_since
            )
            if len(self._first_losses) < FIRST_LOSSES and math.isfinite(row.loss):
                self._know_first_losses([*self._first_losses, row.loss])

    def _know_first_losses(self, losses: Sequence[float]) -> None:
        self._first_losses = list(losses)
        self.reference_loss = median(np.array(self._first_losses))

    def _forget_losses(self) -> None:
        self.reference_loss, self._first_losses, self.losses = math.nan, [], 0
        self._harder = 0.0

    @property
    def first_loss(self) -> float:
        """The first finite loss of the current task; NaN before it."""
        return self._first_losses[0] if self._first_losses else math.nan

    def follow_task(self) -> None:
        """Raise `largest_first_loss` to the last loss, because the task has become harder."""
        if math.isfinite(self.row.loss):
            self._harder = max(self._harder, abs(self.row.loss))

    @property
    def need_not_fall(self) -> bool:
        """True where the loss itself need not fall, and not only several losses have no level together."""
        return self.resting not in ("", APART)

    def rest_loss(self, why: str) -> None:
        """Set why the loss need not fall; "": rules expect it to fall again."""
        self.resting = why
        self._stuck_at = -1

    def loss_level(self, window: int = 32) -> tuple[float, float]:
        """Return the median and the scaled MAD of the ``window`` losses before the last one."""
        return median_and_mad(self.task_loss(last=window + 1)[:-1])

    @property
    def least_loss(self) -> float:
        """The smallest kept loss of the current task; infinity if none was seen."""
        return float(np.fmin.reduce(self.task_loss(), initial=math.inf))

    @property
    def largest_first_loss(self) -> float:
        """The largest magnitude of the first 16 finite losses and of the losses passed to `follow_task` since.

        NaN before the sixteenth.
        """
        enough = len(self._first_losses) == FIRST_LOSSES
        return max(self._harder, *map(abs, self._first_losses)) if enough else math.nan

    @property
    def became_harder(self) -> bool:
        """True if `largest_first_loss` is a loss passed to `follow_task`, and not one of the beginning."""
        return self._harder > max(map(abs, self._first_losses), default=math.inf)

    @property
    def stuck(self) -> bool:
        """True if at least 100 losses were seen and the median of the last 32 is less than a tenth below the reference.

        False where the loss need not fall, and where it began at zero.
        """
        if self._stuck_at != self.rows:
            waits = self.losses >= 100 and not self.resting and self.reference_loss != 0
            self._stuck_at, self._stuck = self.rows, waits and not self.gained(0.1, last=32)
        return self._stuck

    def gained(self, share: float, last: int = 16) -> bool:
        """Return whether the median of the last losses is below the reference loss by at least ``share`` of it."""
        now, _ = median_and_mad(self.task_loss(last=last))
        return bool(self.reference_loss - now >= share * abs(self.reference_loss))

    def has_halved(self, part: float = 1.0) -> bool:
        """Return whether the median of the last 32 losses is at most half of the first loss and of the reference loss.

        The reference alone may be a loss of an explosion. ``part`` of the first losses is what is compared: the rest may have
        been of something that no longer counts.
        """
        now, _ = median_and_mad(self.task_loss(last=32))
        began = part * min(self.reference_loss, self.first_loss)
        return bool(began > 0 and now <= began / 2)

    def loss_left(self, step: int) -> float:
        """Return what was left of the loss at ``step``: the median of 8 losses from there over that of 8 before, at most 1."""
        losses = self.task_loss()
        place = int(np.searchsorted(self.steps(last=len(losses)), step))
        before, _ = median_and_mad(losses[max(0, place - _NEAR) : place])
        after, _ = median_and_mad(losses[place : place + _NEAR])
        return min(1.0, after / before) if before > 0 and after > 0 else 1.0

    def loss_is_rising(self) -> bool:
        """Return whether the last loss and the median of the last 4 are above the `loss_ceiling` of the 32 before them.

        During the first 12 losses their scatter is not known yet: True if the last loss is more than twice the first. True
        if no loss was seen, since nothing shows that the run is healthy. Losses below a tenth of the reference are ignored.
        """
        if not self._first_losses:
            return True
        if self.losses < EARLY:
            return not self.row.loss <= self._first_losses[0] + abs(self._first_losses[0])
        now, _ = median_and_mad(self.task_loss(last=4))
        return not (0 <= now < self.reference_loss / 10 or min(now, self.row.loss) <= self.loss_ceiling(last=4))

    def next_loss_level(self) -> tuple[float, float]:
        """Return what `loss_level` will return once the next loss is there."""
        return median_and_mad(self.task_loss(last=32))

    def next_loss_ceiling(self) -> float:
        """Return the ceiling that `loss_is_rising` will use for the next loss; minus infinity if no loss was seen."""
        if not self._first_losses:
            return -math.inf
        if self.losses < EARLY:
            return self._first_losses[0] + abs(self._first_losses[0])
        return self.loss_ceiling(last=0)

    def loss_ceiling(self, last: int) -> float:
        """Return the usual upper bound of the 32 losses before the ``last`` ones; NaN if none of them is finite.

        The maximum of their 90 % quantile, their median plus three scaled MADs, and their median plus a tenth of it.
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
