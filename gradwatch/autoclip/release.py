"""The release of a clip: when the run is calm, its bounds are loosened by degrees until it does not bite any more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.autoclip.limits import AutoClipLimits
    from gradwatch.history.history import History
    from gradwatch.records import ClipRecord


class Release:
    """How far a clip is released.

    Args:
        hold: calm steps before a clip is loosened.
        limits: the limits of auto-clip.
        history: read for losses.

    Attributes:
        looseness: factor by which the bounds are loosened.
        well_below: level up to which a loss counts as recovered.
    """

    def __init__(self, hold: int, limits: AutoClipLimits, history: History) -> None:
        self._least_hold = hold
        self._limits = limits
        self._history = history
        self._hold: float = hold
        self._held_since = 0
        self._idle = 0  # steps without a bite so far
        self._loss_ceiling = math.inf
        self.looseness = 1.0
        self.well_below = math.inf

    @property
    def begun(self) -> bool:
        """True while the bounds are looser than they were set."""
        return self.looseness > 1.0

    def hold(self, step: int, before: float, scatter: float, *, young: bool) -> None:
        """Hold a clip that is switched on at ``step``; ``young``: before the run had a level of the loss.

        ``before`` and ``scatter`` are the level and the scatter of the losses before that step.
        """
        # a run that began with the explosion has recovered only once it has learned something since
        self.well_below = before - abs(before) / 10 if young else before + max(scatter, abs(before) / 20)
        self._hold, self._held_since, self._idle = self._least_hold, step, 0
        self.end()

    def end(self) -> None:
        """Restore the bounds, because the clip is switched on or off."""
        self.looseness, self._loss_ceiling = 1.0, math.inf

    def take(self, *, changed: bool) -> None:
        """Record a step, and whether its gradients were clipped or withheld."""
        self._idle = 0 if changed else self._idle + 1

    def go_on(self, record: ClipRecord, step: int, calm: int) -> bool:
        """Loosen the clip if it still bites after ``calm`` calm steps; return True when the run no longer needs it."""
        if min(calm, step - self._held_since) < self._hold:
            if self.begun:
                self._tighten(step)
            return False
        level, scatter = self._history.loss_level(self._limits.level)
        # under Adam and similar optimizers a constant clip has no effect anyway
        if level > self.well_below and calm < self._limits.long * self._hold and record.family != "adam":
            return False  # calm, but the loss has not recovered: a release might raise it further
        if self._idle >= (self._limits.idle if self.begun else self._hold):
            return True
        if level > self._loss_ceiling:
            self._tighten(step)
            return False
        if math.isfinite(level):
            # a small rise of a loss that has come down far takes back little
            bearable = min(abs(level), max(0.0, record.loss_before - level) / 10)
            self._loss_ceiling = min(self._loss_ceiling, level + max(3 * scatter, bearable))
        self.looseness *= self._limits.loosen
        return False

    def _tighten(self, step: int) -> None:
        """Restore the bounds and double the hold, because loosening did harm."""
        self.end()
        self._hold, self._held_since = self._limits.longer * self._hold, step
