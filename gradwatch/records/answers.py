"""The answers to two questions that users ask: whether a norm is normal, and what their clip does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwatch.text.wording import counted, number, percent


@dataclass(frozen=True, slots=True)
class UsualNorms:
    """The range in which nine tenths of a run's last global norms lie, and the norm of the last step.

    Attributes:
        low, high: the range.
        since: step of the first norm in it.
        now: the last norm, which is not counted.
        until: step from which on norms are not counted, because an explosion that is open began there; None: there is none.
        measured: False if no layer had a gradient in the last step.
        apart: whether norms of explosions that are over were left out.
        in_turn: whether several optimizers take turns, so that the norms are those of one of them.
    """

    low: float
    high: float
    since: int
    now: float
    until: int | None = None
    measured: bool = True
    apart: bool = False
    in_turn: bool = False

    def __str__(self) -> str:
        times = self.now / self.high
        return self.brief + (f", {number(times, 2)} times the upper end" if 2 <= times < math.inf else "")

    @property
    def brief(self) -> str:
        """The same without the comparison of the last norm with the range."""
        low, high = number(self.low, 2), number(self.high, 2)
        span = low if low == high else f"{low} to {high}"
        when = (
            f"since step {self.since}{' outside of incidents' * self.apart}"
            if self.until is None
            else f"before the incident at step {self.until}"
        )
        when += " in the steps of this optimizer" * self.in_turn
        return f"norm usually {span} {when}, now {number(self.now, 2) if self.measured else 'none'}"


@dataclass(frozen=True, slots=True)
class ClipUse:
    """What clips that may act on each step did in the last steps.

    Attributes:
        whose: the clip in words, such as ``"your clip"``.
        steps: number of steps that are counted.
        cut: number of those in which it made the gradients smaller.
        least: smallest share of a norm that it left; NaN if it made none smaller.
        enlarged: number of those in which it made the gradients larger.
    """

    whose: str
    steps: int
    cut: int
    least: float
    enlarged: int = 0

    def __str__(self) -> str:
        return self.brief + (" of the norm" if self.cut and not self.enlarged else "")

    @property
    def brief(self) -> str:
        """The same in at most 80 characters, if the name of the clip is short."""
        last = f"norm before {self.whose}, which cut {{}} of the last {counted(self.steps, 'step')}"
        share = percent(self.cut / self.steps) if self.cut else "none"
        if self.enlarged:
            return f"{last.format(share)} and scaled up {percent(self.enlarged / self.steps)}"
        if not self.cut:
            return last.format(share)
        left = 100 * self.least
        left = math.floor(left) if left >= 1 else left
        return f"{last.format(share)}, never below {number(left, 2)} %"
