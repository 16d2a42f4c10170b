"""GW502: the clip never bites."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.records import SCALED_UP
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import last_steps, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class ClipNeverBites(Rule):
    """The clip never bites: its threshold is above all gradient norms.

    ## What it means
    You clip on each step, or auto-clip does with `when="always"`, and for hundreds of steps no gradient was large enough to
    be clipped.

    ## Formula
    `value` is the number of rows since a clip coefficient was last below 1, or above it, as where gradients are scaled to a
    norm, among those that the history keeps, if a clip is applied on each step; else `0`. It fires where `value > limit` (500).
    It opens no incident; it is reported as a note, once.

    ## Why it is bad
    It does no harm as long as training goes well. But a clip that has never bitten will do little about the first spike: a
    threshold a hundred times above the usual norm admits a step that is a hundred times too long.

    ## What to do
    Lower the threshold to a few times the run's own typical norm, as suggested by `monitor.suggest_clip()`, or remove the
    clip.

    ## When it is harmless
    In runs whose early phase needed the clip, and where it is meant as a last resort.

    ## Source
    Pascanu et al. (2013), arXiv:1211.5063: first observe common norms, then choose.
    """

    code: ClassVar[str] = "GW502"
    name: ClassVar[str] = "clip never bites"
    sign: ClassVar[Sign] = "clip"
    kind: ClassVar[Kind] = "clipping"
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a threshold far too high", fires=500, clip="1x520"),
        Case("it bit once, 300 steps ago", fires=None, clip="1x200 0.5 1x300"),
        Case("gradients are scaled up", fires=None, clip="3x520"),
        Case("no clip at all", fires=None, grad="1x520"),
    )

    limit: float = Field(default=500.0, gt=0)

    def measure(self, history: History) -> Floats:
        """Return the number of rows since a clip last bit, shape (1,); 0 while that is at most ``limit``."""
        if not history.clips_each_step or history.rows <= self.limit:
            return np.zeros(1)
        left = history.clip_coefficient()
        bites = np.flatnonzero((left < 1) | (left > SCALED_UP))
        kept = min(history.rows, history.window)
        return np.array([float(kept - 1 - bites[-1]) if bites.size else float(kept)])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        unclipped = int(self.measure(history)[0])
        norms = history.global_norm(last=unclipped)
        return {
            "since": history.steps(last=unclipped)[0],
            "largest": np.max(norms, where=np.isfinite(norms), initial=0.0),
            "yours": history.clipped_by_user,
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        return (
            f"{'your clip' if alarm.numbers['yours'] else 'auto-clip'} had cut none of the "
            f"{last_steps(alarm.value, alarm.numbers['since'], alarm.step)} at step {alarm.step} (limit {number(alarm.limit)}); "
            f"their largest norm was {number(alarm.numbers['largest'])}"
        )
