"""GW106: what the run had learned is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.ending import stretches_of
from gradwatch.history.statistics import median, median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import began_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign


class LearningLost(Rule):
    """What the run had learned is lost: its loss is nearly back where it began, and stays there.

    ## What it means
    The loss had fallen, and has come back for good by most of what it had fallen, at once or little by little.

    ## Formula
    `value = (m - b) / (h - b)`, where `m` is the median of the last `window` (64) losses, `b` the least median of 32 losses
    in a row among the kept ones before them, and `h = b + share (r - b)`, with `share` = 0.9 and `r` the reference loss
    (median of the first 16), or the first loss if the reference is more than twice as high. For a mean of cross-entropies,
    `h` is `share` of that of guessing, if `b` is below that. `value = 0` where the loss had not fallen by a tenth of `r` and
    by three times the scatter (scaled MAD) of the last `window` losses, and while it comes down again: the newer half of the
    window is below the older one by a tenth of `m - b`. It is also `0` before `min_steps` (200) losses, where the loss need
    not fall, and unless each loss so far is known to be one of torch's, such as a cross-entropy or a squared error: the value
    of others, such as that of a policy gradient, or of a sum with a penalty, need not measure what was learned. It fires
    where `value > limit` (1.0) for `for_steps` (32) steps.

    ## Why it is bad
    The model is no better than an untrained one. A rate that is too high or dead units do that without a single large jump.

    ## What to do
    Go back to a checkpoint from before the loss rose, and lower the learning rate. Look at what the program changed then: the
    data, the targets, the loss itself.

    ## When it is harmless
    A new task that is not learned.

    ## Source
    The first of the practitioners' signs (Brownlee 2019), for runs that had traction; the limits are this project's.
    """

    code: ClassVar[str] = "GW106"
    name: ClassVar[str] = "learning lost"
    sign: ClassVar[Sign] = "subtle"
    kind: ClassVar[Kind] = "diverging"
    role: ClassVar[Role] = "level"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("back at the beginning", fires=230, loss="2.3*0.99x80 1+0.02x60 2.2x160", loss_of="cross-entropy"),
        Case("halfway back", fires=None, loss="2.3*0.99x80 1+0.01x60 1.6x160", loss_of="cross-entropy"),
        Case("back, and learned again", fires=None, loss="2.3*0.99x80 2.3*0.99x160", loss_of="cross-entropy"),
        Case("never learned", fires=None, loss="2.3x300", loss_of="cross-entropy"),
        Case("a loss that may mean anything", fires=None, loss="2.3*0.99x80 1+0.02x60 2.2x160"),
    )

    limit: float = Field(default=1.0, gt=0)
    share: float = Field(default=0.9, gt=0, le=1)
    min_steps: int = Field(default=200, ge=100)
    window: int = Field(default=64, ge=8)
    for_steps: int = Field(default=32, ge=1)

    def measure(self, history: History) -> Floats:
        """Return how far the loss is back over how far it may be, shape (1,); 0 while it comes down."""
        kept = len(history.task_loss())
        if min(history.losses, kept) < self.min_steps or history.resting or not history.sees_loss:
            return np.zeros(1)
        now, scatter = median_and_mad(history.task_loss(last=self.window))
        if not now > self._high(history, history.least_loss):
            return np.zeros(1)  # the best level is above the least loss; this rejects most rows
        best, began = self._best(history)[0], began_at(history)
        if not began - best > max(abs(began) / 10, 3 * scatter):
            return np.zeros(1)
        older, newer = np.split(history.task_loss(last=self.window), 2)
        comes_down = median(newer) < median(older) - (now - best) / 10
        return np.array([0.0 if comes_down else (now - best) / (self._high(history, best) - best)])

    def _high(self, history: History, best: float) -> float:
        """Return the level up to which the loss may rise, given its best one."""
        guessing = history.guessing
        return self.share * guessing if best < self.share * guessing else best + self.share * (began_at(history) - best)

    def _best(self, history: History) -> tuple[float, int, int]:
        """Return the least level of the loss before the last losses, and the middle and the last step of its stretch."""
        losses = history.task_loss()[: -self.window]
        levels, middles, ends = stretches_of(losses, history.steps(last=history.task_rows)[: len(losses)])
        best = int(np.nanargmin(levels)) if not np.isnan(levels).all() else 0
        return levels[best], middles[best], ends[best]

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        best, step, last = self._best(history)
        began = began_at(history)
        return {
            "loss": median(history.task_loss(last=self.window)),
            "best": best,
            "best at": step,
            "began": began,
            "bound": best + self.limit * (self._high(history, best) - best),
            "high since": last + 1,
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        best, at, began = (alarm.numbers[name] for name in ("best", "best at", "began"))
        loss, limit = apart(alarm.numbers["loss"], alarm.numbers["bound"])
        back = "nearly back at" if alarm.numbers["loss"] < began else "back above"
        return (
            f"the loss was about {loss} at step {alarm.step}, {back} the {number(began)} of its beginning, although it had been "
            f"{number(best)} about step {at:.0f}; above {limit}, most of what was learned is lost"
        )
