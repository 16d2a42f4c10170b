"""What comes back: jumps of the loss that no update has caused, explosions, and steps that are not finite.

Jumps that come back with a period are those of targets or data that the program changes then.
"""

from __future__ import annotations

from typing import NamedTuple

_NEAR = 0.01  # share of the period within which two distances are the same, at least one step
_MISSED = 10  # periods without a jump after which a series is over
_GROWN = 10.0  # multiple of the first jump's loss beyond which a series is no routine of the program,
_RISING = 5  # if so many jumps in a row are each higher than the one before: by chance, one series of 5! = 120 is


class Recurrence(NamedTuple):
    """The place of a jump in a series of them.

    Attributes:
        times: number of jumps of the series so far, this one included.
        period: number of steps between them; None if there is no series.
        grows: whether the loss jumps farther each time, and far higher than at first.
    """

    times: int = 1
    period: int | None = None
    grows: bool = False

    @property
    def routine(self) -> bool:
        """True if it is one of a series whose jumps stay at their size."""
        return self.period is not None and not self.grows


class Recurring:
    """The jumps of one run so far that the last update cannot have caused.

    Attributes:
        last: place of the last jump in the series.
        step: step of the last jump; 0 before the first, whose place the start of the run takes.
    """

    def __init__(self) -> None:
        self.step = 0
        self._gap: int | None = None
        self._first_loss = self._last_loss = 0.0
        self._rising = 0  # jumps in a row, the last one included, each higher than the one before
        self._others = False  # whether the last jump was not the first
        self.last = Recurrence()

    def is_due(self, step: int) -> bool:
        """Return whether a jump at ``step`` would be the next one of a routine of the program."""
        return self.last.routine and self._fits(step - self.step, self.last.period or 1)

    def jumped(self, step: int, loss: float, *, one_batch: bool = False) -> Recurrence:
        """Record a jump to ``loss`` at ``step``, and return its place.

        A series begins with two distances that are the same, where that of the first jump of the run is counted from its start.
        ``one_batch``: the jump before was that of one batch alone, so that the program has not changed its data for good.
        """
        gap, before, known = step - self.step, self._gap, self.last.period
        self.step, self._gap = step, gap
        self._rising = self._rising + 1 if loss > self._last_loss else 1
        self._last_loss = loss
        if one_batch:
            self.last = Recurrence()
        elif known is not None and self._fits(gap, known):
            grown = self._rising >= _RISING and loss > _GROWN * self._first_loss
            self.last = Recurrence(self.last.times + 1, known, self.last.grows or grown)
        elif before is not None and abs(gap - before) <= max(1.0, _NEAR * before):
            self.last = Recurrence(3 if self._others else 2, gap)
        else:
            self.last = Recurrence()
        if self.last.period is None:
            self._others, self._first_loss, self._rising = before is not None, loss, 1
        return self.last

    @staticmethod
    def _fits(gap: int, period: int) -> bool:
        periods = round(gap / period)
        return 1 <= periods <= _MISSED and abs(gap - periods * period) <= max(1.0, _NEAR * gap)


class Returns(NamedTuple):
    """The place of an explosion, or of steps that are not finite, among those of the run.

    Attributes:
        times: times that it came so far, this one included; times between which the alarm did not resolve are one.
        since: the first step at which it came; None: it never did.
        step: the step at which it came last.
        period: number of steps from one time to the next; None: they do not come with a period, or it is not known yet.
    """

    times: int = 0
    since: int | None = None
    step: int = -1
    period: int | None = None


class Times:
    """The times that one thing came in a run.

    Attributes:
        last: place of the last one.
    """

    def __init__(self) -> None:
        self._series = Recurring()
        self.last = Returns()

    def came(self, step: int) -> Returns:
        """Record that it came at ``step``, after steps without it, and return its place."""
        period = self._series.jumped(step, 0.0).period
        since = step if self.last.since is None else self.last.since
        self.last = Returns(self.last.times + 1, since, step, period)
        return self.last
