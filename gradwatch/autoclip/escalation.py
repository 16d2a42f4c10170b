"""The measures that follow when clipping has not helped, in the order of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.errors import TrainingUnstableError
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.records import Row


class Escalation:
    """The measures taken in one run.

    Attributes:
        rate: factor on the learning rates, which stays lowered until the end of the run.
    """

    def __init__(self, policy: AutoClip) -> None:
        self.rate = 1.0
        self._news: list[str] = []
        self._limits = policy.limits
        self._measures = policy.escalate
        self._patience = policy.patience
        self._next = 0
        self._halvings = 0

    def take_news(self) -> list[str]:
        """Return the sentences about measures that were taken since the last call."""
        news, self._news = self._news, []
        return news

    def begin(self) -> None:
        """Start again with the first measure, for a new incident."""
        self._next = 0

    @property
    def left(self) -> bool:
        """True while there are measures left to take."""
        return self._next < len(self._measures)

    @property
    def skips(self) -> bool:
        """True if steps that surge are left out."""
        return "skip" in self._measures[: self._next]

    def go_on(self, row: Row, began: int, before: float, level: float) -> str:
        """Take the next measure and return its description.

        Args:
            row: the row of the coming step.
            began: step at which the incident opened.
            before: level that the loss did not exceed before the incident.
            level: current level of the loss.

        Raises:
            TrainingUnstableError: the next measure is ``"stop"``.
        """
        measure = self._measures[self._next]
        # under Adam the norm does not set the step length
        if measure == "skip" and row.family == "adam" and "rate" in self._measures:
            self._next += 1
            measure = self._measures[self._next]
        told = f"Clipping has not helped for {self._patience} steps: "
        if measure == "stop":
            raise TrainingUnstableError(
                f"{told}the loss was {number(before)} or below before step {began} and is {number(level)}. Stopped before step "
                f"{row.step}, as the policy's last measure; parameters are those after the step before. Lower the learning "
                "rate, or go back to a checkpoint from before the incident."
            )
        if measure == "rate":
            self.rate /= 2
            self._halvings += 1
            self._next += self._halvings >= self._limits.halvings
            done = f"learning rate x {self.rate:g} from step {row.step} on"
        else:
            self._next += 1
            done = f"steps of more than {self._limits.surge:g} times the typical norm left out from step {row.step} on"
        self._news.append(f"{told}{done}.")
        return done
