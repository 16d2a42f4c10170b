"""The state of auto-clip in one run: when it is on, its bounds, its further measures, and the record of what it did.

Auto-clip does not detect trouble by itself. It acts on the incident that the verdict opened, in the step in which it opened.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.autoclip.effect import ClipEffect
from gradwatch.autoclip.escalation import Escalation
from gradwatch.autoclip.guard import Guard
from gradwatch.autoclip.release import Release
from gradwatch.clips import ClipNorm
from gradwatch.clips.base import OneFactor
from gradwatch.errors import TrainingUnstableError
from gradwatch.history.gradient_norms import SETTLED
from gradwatch.history.losses import EARLY
from gradwatch.history.recurrence import jump_scale, one_step_norms
from gradwatch.history.typical_norm import LEAST_NORMS, typical_norm
from gradwatch.records import SCALED_UP, SEVERITIES, ClipRecord

if TYPE_CHECKING:
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.clips import Clip
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Incident, Row


_SHORTER = 0.99  # share of its bound below which a clipped norm was shortened by more than the clip
_WEIGHTS = "GW304"  # growth of weights, as that of a run that learns
_SQUARABLE = math.sqrt(float(np.finfo(np.float32).max))  # norm up to which Adam's average of squares is finite
_YOUNG = 64  # rows before which the bounds in reserve follow each row


class AutoClipEngine:
    """The state of auto-clip in one run.

    While on, it clips with its bounds until the run has been calm for ``hold`` steps. If the clip does not bite any more, it is
    released; otherwise its bounds are loosened step by step until it does not bite. If the loss gets worse meanwhile, the
    bounds are restored and the hold is doubled. Each explosion is met anew, with bounds from the norms before it. Where
    clipping does not help, the measures that the policy allows follow.

    Args:
        policy: what the user asked for.
        history: read for norms and losses.

    Attributes:
        clipped: number of steps that were clipped.
        scaled_up: number of steps whose gradients the clip made larger.
        skipped: number of steps that were left out.
        further: the state of the measures beyond clipping.
        record: what was done since an incident switched auto-clip on; None if no incident did.
    """

    def __init__(self, policy: AutoClip, history: History) -> None:
        self.policy = policy
        self._limits = policy.limits
        self.history = history
        self.clipped = 0
        self.scaled_up = 0
        self.skipped = 0
        self.further = Escalation(policy)
        self.record: ClipRecord | None = None
        self._changed: ClipRecord | None = None
        self._baseline = policy.clip.baseline()
        self._looked = 0
        self._bounds: Clip = policy.clip
        self._reserve = -LEAST_NORMS  # row at which the bounds for a surge on a device were set
        self._typical = math.nan
        self._usual: Floats = np.full(0, np.nan)
        self._one_step: Floats = np.full(0, np.nan)
        self._with_usual = 0  # number of layers of which that is known
        self._least_weight: Floats = np.full(0, np.inf)
        self._jump_scale = math.nan
        self._outliers_alone = False
        self._narrowed = 1.0
        # by optimizer, since a step of another optimizer does not end a series of skips
        self._skips_in_a_row: dict[int, int] = {}
        self._release = Release(policy.hold, policy.limits, history)
        self._effect = ClipEffect(math.inf, policy.limits)
        self._spared = -math.inf  # norm up to which clipping was found to do harm
        self._judged = ClipRecord("", 0)
        self._judged_at = 0
        self._judged_level = math.inf
        self._predicted = 0.0
        self._clips = True  # whether the open incident is one of norms

    @property
    def on(self) -> bool:
        """True while auto-clip acts on each step."""
        return self.record is not None or self.policy.when == "always"

    @property
    def _is_clipping(self) -> bool:
        if self.policy.when == "always":
            return True
        return self.record is not None and self._clips and self.record.lifted_step is None

    @property
    def lifted(self) -> bool:
        """True while the clip that is on was lifted and no other measure is in force, so that it changes no step."""
        lifted = self.record is not None and self.record.lifted_step is not None
        return lifted and not self.further.skips and self.further.rate == 1.0

    @property
    def acts(self) -> bool:
        """True while every step must be passed to `decide`."""
        return self.on or self.further.rate != 1.0

    # Which clip.

    @property
    def called(self) -> str:
        """The clip in words, with the bounds that it has now; without any while they are still to be set by the run's norms."""
        to_be_set = (
            self.policy.threshold is not None and self._bounds is self.policy.clip and not (self.on or self.clipped)
        )
        return type(self._bounds).__name__ if to_be_set else str(self._bounds)

    def clip(self, rows: int) -> Clip | None:
        """Return the clip with its current bounds, given the first ``rows`` rows of the run; None if they are not known yet."""
        clip = self._bounds if self._baseline is None else self._baseline.clip(self.history, rows)
        return clip.loosened(self._release.looseness) if clip is not None and self._release.begun else clip

    def _set_bounds(self, but: int) -> None:
        """Set the bounds of the policy's clip by its threshold and the norms before the newest ``but``."""
        rows = self.history.task_rows
        norms = self.history.global_norm(last=rows)
        calm = self.history.outside(self.history.destructive, rows)
        norms, calm = norms[: rows - but], calm[: rows - but]
        self._typical = typical_norm(norms[calm] if np.count_nonzero(calm) >= LEAST_NORMS else norms)
        self._narrowed = 1.0
        times = self._limits.wide if self.policy.threshold == "auto" else self.policy.threshold or math.nan
        bound = times * self._typical
        if self._spared > 0 and self.policy.clip.takes_threshold:
            bound = float(np.fmax(bound, self._spared))
        self._bounds = self.policy.clip if math.isnan(bound) else self.policy.clip.at_norm(bound, self.history)

    def plan(
        self, surge: float, far: float, jump: float, update: float, overshoot: float, *, ahead: int = 0
    ) -> DevicePlan:
        """Return what to do with the coming step, in advance.

        ``surge``, ``far``, ``jump``, ``update`` and ``overshoot`` are the limits of the rules, and ``ahead`` is the number of
        steps that were made since the last row that has arrived. A step that overshoots is an incident by itself only in the
        first steps, and only while no loss below zero was seen.
        """
        explosive = self.policy.when != "always" and "exploding" in self.policy.when
        rows = self.history.rows
        # what is usual changes quickly at first, and is not known of layers that were added
        old = rows - self._reserve >= LEAST_NORMS or len(self._one_step) != len(self.history.layers)
        if explosive and not self.on and (old or self._reserve < rows < _YOUNG):
            self._set_bounds(0)
            self._one_step = one_step_norms(self.history)
            self._with_usual = int(np.count_nonzero(np.isfinite(self._one_step)))
            self._jump_scale = self._next_jump(recurring=True)[1]
            divides = self.history.row.family == "adam" and self.policy.threshold == "auto"
            self._outliers_alone = divides and not self.history.has_halved()
            if len(self._least_weight) != len(self.history.layers):
                self._least_weight = np.where(self.history.large_matrices, self.history.half_usual, np.inf)
            self._reserve = self.history.rows
        clip = self.clip(self.history.rows) if self.on or explosive else None
        reserve = self._in_reserve(clip) if explosive and not self.on and math.isinf(self._spared) else None
        level, scatter = self.history.next_loss_level() if reserve is not None else (math.inf, 0.0)
        middle, scale = self._next_jump(recurring=False) if reserve is not None else (math.nan, math.nan)
        early = self.history.losses + ahead + 1 < EARLY  # the rules judge a step with its own loss counted
        return DevicePlan(
            clip=clip if self._is_clipping else None,
            guard=self._guard(),
            reserve=reserve,
            usual=self._one_step,
            judged=self._with_usual,
            least_weight=self._least_weight,
            skip=self.policy.on_nonfinite != "ignore",
            surge=surge,
            far=far,
            update=update,
            early=early,
            overshoot=overshoot if early and self.history.least_loss >= 0 else math.inf,
            reference=self.history.reference_loss,
            loss_ceiling=self.history.next_loss_ceiling() if reserve is not None else math.inf,
            loss_level=level + scatter,
            loss_jump=float(np.nan_to_num(middle + jump * np.fmax(scale, self._jump_scale), nan=np.inf, posinf=np.inf)),
            skip_above=self._skip_above,
            rate=self.further.rate,
            outliers_alone=self._outliers_alone,
        )

    def _next_jump(self, *, recurring: bool) -> tuple[float, float]:
        """Return the level of the loss and the scale of a jump for the next loss; NaN before the fourth."""
        if self.history.losses < 3:
            return math.nan, math.nan
        return jump_scale(self.history, 32, recurring=recurring, coming=True)

    def _in_reserve(self, clip: Clip | None) -> Clip | None:
        """Return what clips a step that surges before a rule has judged it: one factor for all, which costs next to nothing."""
        if clip is None or clip.own or isinstance(clip, OneFactor):
            return clip
        # in the first steps only the norms of layers are settled
        typical = math.sqrt(np.nansum(self._settled_norms() ** 2)) if math.isnan(self._typical) else self._typical
        return ClipNorm(self._limits.wide * typical) if typical > 0 else clip

    def _settled_norms(self) -> Floats:
        """Return the typical gradient norm of each layer, shape (L,); NaN where too few norms are known."""
        typical = self.history.typical_grad
        return np.where(typical.seen >= SETTLED, typical.value, np.nan)

    # What to do.

    def decide(self, row: Row, incident: Incident | None) -> Decision:
        """Return what to do with the gradients of ``row`` before the optimizer uses them.

        Args:
            row: the row of the coming step, which is the last of the history.
            incident: the open explosion that auto-clip may treat; None: there is none.

        Raises:
            TrainingUnstableError: too many steps in a row had to be skipped, ``on_nonfinite`` is ``"stop"`` and gradients are
                not finite, or the last measure of the policy is ``"stop"`` and it is due.
        """
        if self.record is None and incident is not None and self._switches_on(incident, row):
            self._begin(row, incident.clip)
        if incident is not None:  # norms are not what is wrong where nothing but NaN or infinity was seen
            grown = [one for one in incident.signs if one.sign == "growth" and one.code != _WEIGHTS]
            self._clips = bool(grown) or incident.kind != "nonfinite"
        if row.poisoned:
            return self._skip(row) if self.policy.on_nonfinite != "ignore" else NOTHING
        if self.record is not None and self._effect.unlearned is not None:
            self._spare(row.step)
        if self.record is not None:
            self._lift(row, incident)
            self._go_further(row, incident)
        skips = self._skips_in_a_row.get(row.optimizer, 0)
        if row.global_norm > self._skip_above and skips < self.policy.max_skips:
            self._skips_in_a_row[row.optimizer] = skips + 1
            return Decision(skip=True)
        self._skips_in_a_row[row.optimizer] = 0
        # a baseline must see all norms before the ring overwrites them
        clip = self.clip(self.history.rows - 1) if self.on or self._begin_to_catch_up() else None
        if not self.acts:
            return NOTHING
        return Decision(clip if self._is_clipping else None, rate=self.further.rate, guard=self._guard())

    def _guard(self) -> Guard | None:
        if not self._is_clipping or self.record is None or self.policy.threshold != "auto":
            return None
        history = self.history
        usual = self._usual if len(self._usual) == len(history.layers) else np.full(len(history.layers), np.nan)
        return Guard(usual, history.decrease_rates, history.reference_loss, self._release.looseness, self._limits)

    def _begin_to_catch_up(self) -> bool:
        behind = self._baseline is not None and self.history.rows - self._looked >= self.history.window // 2
        if behind:
            self._looked = self.history.rows
        return behind

    def _switches_on(self, incident: Incident, row: Row) -> bool:
        least = SEVERITIES.index(self.policy.severity)
        enough = SEVERITIES.index(incident.severity) >= least and not row.global_norm <= self._spared
        return enough and self.policy.when != "always" and incident.kind in self.policy.when

    def _begin(self, row: Row, earlier: ClipRecord | None) -> None:
        before, scatter = self.history.loss_level()
        before = before if math.isfinite(before) else row.loss
        self._release.hold(row.step, before, scatter, young=self.history.losses < self._limits.level)
        self._set_bounds(1)
        self._usual = self._settled_norms()
        told = (str(earlier),) if earlier is not None else ()  # it was released during this same incident
        self.record = ClipRecord(str(self._bounds), row.step, loss_before=before, family=row.family, measures=told)
        self._effect = ClipEffect(self._release.well_below, self._limits)
        self._judged, self._judged_at, self._judged_level, self._predicted = self.record, row.step, math.inf, 0.0
        self.further.begin()

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Record what was done to the gradients of ``row``.

        Args:
            row: the row of the step.
            decision: the decision that was carried out.
            coefficient: global norm after clipping over the norm before.
        """
        clipped = decision.clip is not None and coefficient < 1.0
        scaled_up = decision.clip is not None and coefficient > SCALED_UP
        self.clipped += clipped
        self.scaled_up += scaled_up
        self.skipped += decision.skip
        self._release.take(changed=clipped or decision.skip)
        if self.record is None:
            return
        if not decision.skip and not row.poisoned:
            decrease = self.history.predicted_decrease
            self._predicted += coefficient * (np.nansum(decrease) if np.isfinite(decrease).any() else math.nan)
            self._effect.take(row.loss, row.global_norm, clipped=clipped)
        norm = row.global_norm
        record = replace(
            self.record,
            steps=self.record.steps + 1,
            clipped=self.record.clipped + clipped,
            scaled_up=self.record.scaled_up + scaled_up,
            skipped=self.record.skipped + decision.skip,
            loss_after=row.loss,
        )
        if math.isfinite(norm) and not norm <= record.norm_before:
            after = 0.0 if decision.skip else norm * coefficient
            bound = decision.clip.max_norm if isinstance(decision.clip, ClipNorm) else 0.0
            shorter = not decision.skip and clipped and after < _SHORTER * min(bound, norm)
            record = replace(
                record, norm_before=norm, norm_after=after, loosened=self._release.begun, corrected=shorter
            )
        self.record = self._changed = record

    def take_changed(self) -> ClipRecord | None:
        """Return the record of the open explosion if it changed since the last call, else None."""
        changed, self._changed = self._changed, None
        return changed

    # Letting go.

    def abandon(self, step: int) -> None:
        """End without a claim, because auto-clip acts no longer."""
        if self.record is not None:
            self._changed = replace(self.record, released_step=step)
            self.record = None

    def _spare(self, step: int) -> None:
        """Release the clip at once, because it harms the steps that it clips."""
        assert self.record is not None
        unlearned, self._spared = self._effect.unlearned, max(self._spared, self._effect.largest_norm)
        record = replace(self.record, unlearned=unlearned, spared=self._spared, released_step=step, helped=False)
        record = replace(record, loss_after=self.history.loss_level(self._limits.level)[0])
        self._release.end()
        self.record, self._changed = None, record

    def _lift(self, row: Row, incident: Incident | None) -> None:
        """Clip no further under Adam and its like where most steps are clipped, or an explosion raised a loss not yet learned.

        They divide gradients by their own average size, so that a clip on each step does not shorten their steps, while a large
        gradient that they see does, for long. Only a single outlier is better clipped: beside a usual loss, or of a run that has
        learned at this rate. So is a gradient whose square is infinite in float32: weights would not move again.
        """
        assert self.record is not None
        if row.family != "adam" or self.policy.threshold != "auto":
            return
        if row.global_norm > _SQUARABLE:
            if self.record.lifted_step is not None:
                self.record = self._changed = replace(self.record, lifted_step=None)
            return
        often = self.record.clipped > self._limits.bites * self.record.steps
        exploded = not self.record.steps and incident is not None and incident.kind != "spike"
        lifts = often or (exploded and row.loss > self.history.loss_ceiling(last=1) and not self.history.has_halved())
        if lifts and self.record.lifted_step is None:
            self.record = self._changed = replace(self.record, lifted_step=row.step)

    def try_to_let_go(self, step: int, calm: int) -> bool:
        """Loosen the clip if it still bites after ``calm`` calm steps; return True when the run no longer needs it."""
        if self.record is None:
            return calm >= self.policy.hold
        return self._release.go_on(self.record, step, calm)

    def let_go(self, step: int) -> ClipRecord | None:
        """Switch auto-clip off because the incident closes; return the finished record, or None if it was not on."""
        if self.record is None:
            return None
        record = replace(self.record, released_step=step)
        self._release.end()
        self.record = None
        return record

    # Further measures.

    @property
    def _skip_above(self) -> float:
        """The norm above which a step is left out; infinite unless ``"skip"`` is in force and a typical norm is known."""
        if self.record is None or not self.further.skips or math.isnan(self._typical):
            return math.inf
        return self._limits.surge * self._typical

    def _go_further(self, row: Row, incident: Incident | None) -> None:
        """Lower the threshold or take the next measure if the loss has not come down for ``patience`` steps.

        A clip that bites on most steps gives them all the same length. This length is too long if the predicted decrease
        exceeds the loss and less than a quarter of it was achieved. It is not too long if the predicted decrease is small,
        however slow the progress.
        """
        assert self.record is not None
        if row.step - self._judged_at < self.policy.patience or self._release.begun:
            return
        level, _ = self.history.loss_level(self._limits.level)
        fell, predicted = self._judged_level - level, self._predicted
        falls, well = level < self._limits.falls * self._judged_level, not level > self._release.well_below
        steps, clipped = self.record.steps - self._judged.steps, self.record.clipped - self._judged.clipped
        self._judged, self._judged_at, self._predicted = self.record, row.step, 0.0
        self._judged_level = min(level, self._judged_level)
        if falls or (well and clipped < self._limits.bites * steps):
            return
        too_long = not well if math.isnan(predicted) else predicted >= level and fell <= self._limits.kept * predicted
        # under Adam and similar optimizers the step length does not depend on the gradient norm
        narrows = self.policy.threshold == "auto" and self._narrowed > self._limits.narrowest and row.family != "adam"
        if narrows and too_long:
            self._narrowed /= 2
            self._bounds = self._bounds.loosened(1 / 2)
            first = self.record.narrowed_from or self.record.clip
            self.record = replace(self.record, clip=str(self._bounds), narrowed_from=first, narrowed_step=row.step)
        elif self.further.left and not well:
            began = incident.opened_step if incident is not None else self.record.from_step
            done = self.further.go_on(row, began, self._release.well_below, level)
            self.record = replace(self.record, measures=(*self.record.measures, done))

    def _skip(self, row: Row) -> Decision:
        skips = self._skips_in_a_row[row.optimizer] = self._skips_in_a_row.get(row.optimizer, 0) + 1
        weights = bool(self.history.nonfinite_weight.any())
        if self.policy.on_nonfinite == "stop" or skips > self.policy.max_skips:
            self.record = None
            where = self.history.first_nonfinite() or "an unknown layer"
            what = f"Gradients are not finite at step {row.step} (first in backward order: {where})"
            if self.policy.on_nonfinite == "stop":
                raise TrainingUnstableError(f'{what}, and on_nonfinite="stop". They were not applied.')
            cause = (
                "the weights themselves are not finite, so no later step can succeed; go back to a checkpoint"
                if weights
                else "no batch since then gave finite gradients; look at the loss and the data of this step"
            )
            raise TrainingUnstableError(
                f"{what}, after {skips - 1} steps in a row whose gradients were withheld from this optimizer, of at most "
                f"{self.policy.max_skips}: {cause}. No non-finite gradient was applied."
            )
        return Decision(skip=True)
