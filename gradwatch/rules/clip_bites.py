"""GW501: the clip bites on most steps, and the loss suffers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import last_steps, number, percent

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign

_LAST = 100


class ClipBites(Rule):
    """The clip bites on most steps, and the loss suffers: it acts as a learning rate.

    ## What it means
    A clip, your own or auto-clip's, made the gradients smaller on more than four in five of the last 100 steps, the warm-up
    of the learning rate is over, and the loss makes no progress.

    ## Formula
    `value = (number of steps with a clip coefficient below 1) / 100`, over the last 100 rows. It is `0` before row 100, until
    100 rows after the learning rate last reached a new maximum of the run, and while the loss does not suffer. The loss suffers
    if it is stuck (at least 100 losses, and the median of the last 32 less than a tenth below the reference loss) or if that
    median is above the usual upper bound of the 32 losses before these 100 rows. It fires where `value > limit` (0.8). It opens
    no incident; it is reported as a note, once.

    ## Why it is bad
    A clip is meant for rare steps. A clip that always bites gives every update the same length, so the learning rate no
    longer has its usual meaning. It can also hide a fault, because norms that keep growing do not show in the loss.

    ## What to do
    Look at the norms before the clip (`monitor.history.global_norm()`) and raise the threshold until it catches only
    outliers; `monitor.suggest_clip()` counts the steps that each choice would have clipped. If the norms themselves keep
    growing, look for the cause: the learning rate, the scale of the targets, the initialisation.

    ## When it is harmless
    Where gradients are scaled to a fixed norm on purpose. Recipes of language models that clip to a norm of 1.0 often bite on
    most steps and learn well: the rule is silent there.

    ## Source
    Pascanu et al. (2013), arXiv:1211.5063: thresholds of half to ten times the average norm converge alike.
    """

    code: ClassVar[str] = "GW501"
    name: ClassVar[str] = "clip bites on most steps"
    sign: ClassVar[Sign] = "clip"
    kind: ClassVar[Kind] = "clipping"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a threshold far too low", fires=99, clip="0.1x120"),
        Case("from step 60 on", fires=140, clip="1x60 0.5x100"),
        Case("on each step, and the loss falls", fires=None, clip="0.1x150", loss="2*0.99x150"),
        Case("on each step of a warm-up", fires=None, clip="0.1x150", rate="0.001+0.001x150"),
        Case("and the loss rises again", fires=202, clip="1x60 0.1x200", loss="2*0.98x130 0.6x130"),
        Case("every other step", fires=None, clip="1 0.5 1 0.5 1 0.5 1 0.5 1x150"),
        Case("no clip", fires=None, grad="1x150"),
    )

    limit: float = Field(default=0.8, gt=0, lt=1)

    def measure(self, history: History) -> Floats:
        """Return the share of the last 100 steps that were clipped, shape (1,); 0 in a warm-up and while the loss is well."""
        if min(history.rows, history.rows_at_top_rate) < _LAST:
            return np.zeros(1)
        share = np.count_nonzero(history.clip_coefficient(last=_LAST) < 1) / _LAST
        return np.array([share if share > self.limit and self._loss_suffers(history) else 0.0])

    @staticmethod
    def _loss_suffers(history: History) -> bool:
        level, _ = median_and_mad(history.task_loss(last=32))
        return history.stuck or bool(level > history.loss_ceiling(last=_LAST))

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        left, norms = history.clip_coefficient(last=_LAST), history.global_norm(last=_LAST)
        cut = left < 1
        bound, spread = median_and_mad((left * norms)[cut])
        return {
            "cut": np.count_nonzero(cut),
            "since": history.steps(last=_LAST)[0],
            "norm": median_and_mad(norms)[0],
            "bound": bound if spread < bound / 100 else math.nan,
            "yours": history.clipped_by_user,
            "stuck": history.stuck,
            "before": history.loss_ceiling(last=_LAST),
            **stuck_at(history),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        numbers, loss = alarm.numbers, in_words(alarm)
        if not numbers["stuck"]:
            loss = (
                f"the loss rose to about {number(numbers['loss'])} (it was usually below {number(numbers['before'])})"
            )
        clip, does = "your clip" if numbers["yours"] else "auto-clip", "changed nearly every gradient"
        if math.isfinite(numbers["bound"]):
            clip, does = f"{clip} to a norm of {number(numbers['bound'])}", "gave nearly every gradient the same length"
        return (
            f"{clip} had cut {numbers['cut']:.0f} of the {last_steps(_LAST, numbers['since'], alarm.step)} at step {alarm.step} "
            f"(limit {percent(alarm.limit)}): at their norms (median {number(numbers['norm'])}) it {does}, and {loss}"
        )
