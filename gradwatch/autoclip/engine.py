"""Auto-clip in one run: on, how tight, what next, off again, and what it did about the incident.

It never guesses for itself: it acts on the incident that the rules opened, in the very step in which it opened.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.autoclip.effect import ClipEffect
from gradwatch.autoclip.escalation import SURGE, Escalation
from gradwatch.autoclip.guard import WIDE, Guard
from gradwatch.errors import TrainingUnstableError
from gradwatch.history.history import SETTLED
from gradwatch.history.typical_norm import LEAST_NORMS, typical_norm
from gradwatch.records import SEVERITIES, ClipRecord, Severity

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.clips import Clip
    from gradwatch.history.history import History
    from gradwatch.records import Incident, Row

_LOOSEN = 1.03  # by step, while letting go: twice the bounds after 24 steps
_LONG = 4  # times the hold after which it lets go although the loss has not come down: the task may be another one now
_LEVEL = 16  # losses whose median must not rise meanwhile
_IDLE = 10  # steps without a bite after which a loosened clip is let go
_RELAPSE = 10  # times the hold after a release in which an explosion is the same one come back
_NARROWEST = 1 / 4  # of where it began: how low it goes
_FALLS = 0.9  # times its level before: a loss that comes down
_BITES = 0.5  # share of clipped steps from which the clip sets the length of the steps
_KEPT = 1 / 4  # of what steps promised: with less, they are too long


class AutoClipEngine:
    """Auto-clip's state in one run.

    On, it clips with its bounds until the run has been calm for ``hold`` steps. If the clip no longer bites then, it lets go;
    if it does, it lets go by degrees, loosening the bounds step by step until it bites no more. When the loss gets worse
    meanwhile, it goes back to its bounds and holds twice as long; so it does when the explosion comes back soon after, and
    then its first sign is enough to switch it on. Where clipping does not help it goes on to the measures that the policy allows.

    Args:
        policy: the user's.
        history: read for norms and losses.
        damage: returns what of the model is not finite, in words; empty where all of it is.

    Attributes: ``clipped`` and ``skipped`` count steps, ``further`` is what is done beyond clipping.
    """

    def __init__(self, policy: AutoClip, history: History, damage: Callable[[], str] = str) -> None:
        self.policy = policy
        self._damage = damage
        self.history = history
        self.clipped = 0
        self.skipped = 0
        self.further = Escalation(policy)
        self.record: ClipRecord | None = None
        self._changed: ClipRecord | None = None
        self._baseline = policy.clip.baseline()
        self._looked = 0
        self._bounds: Clip = policy.clip
        self._reserve = -LEAST_NORMS  # the row at which the bounds for a surge on a device were taken
        self._typical = math.nan
        self._usual = np.full(0, np.nan)
        self._narrowed = 1.0
        self._skips_in_a_row: dict[
            int, int
        ] = {}  # by optimizer: what one of two leaves out the other does not make good
        self._hold = policy.hold
        self._held_since = 0
        self._released = -math.inf
        self._looseness = 1.0
        self._loss_ceiling = math.inf
        self._well_below = math.inf
        self._idle = 0
        self._effect = ClipEffect(math.inf)
        self._spared = -math.inf  # a norm up to which clipping was found to do harm
        self._judged = ClipRecord("", 0)
        self._judged_at = 0
        self._judged_level = math.inf
        self._promised = 0.0

    @property
    def on(self) -> bool:
        """True while it clips."""
        return self.record is not None or self.policy.when == "always"

    @property
    def acts(self) -> bool:
        """True while no step may pass unseen."""
        return self.on or self.further.rate != 1.0

    # Which clip.

    def clip(self, rows: int) -> Clip | None:
        """Return the clip with the bounds of this moment, from the run's first ``rows`` rows; None: nothing to go by yet."""
        clip = self._bounds if self._baseline is None else self._baseline.clip(self.history, rows)
        return clip if self._looseness == 1.0 or clip is None else clip.loosened(self._looseness)

    def _set_bounds(self, but: int) -> None:
        """Take the policy's clip at its threshold, by the norms that came before the last ``but``."""
        norms = self.history.global_norm(last=self.history.task_rows)
        self._typical = typical_norm(norms[: len(norms) - but])
        self._narrowed = 1.0
        times = WIDE if self.policy.threshold == "auto" else self.policy.threshold or math.nan
        bound = times * self._typical
        if self._spared > 0 and self.policy.clip.takes_threshold:
            bound = float(np.fmax(bound, self._spared))
        self._bounds = self.policy.clip if math.isnan(bound) else self.policy.clip.at_norm(bound, self.history)

    def plan(self, surge: float, far: float) -> DevicePlan:
        """Return what to do with the coming step before its numbers are known; ``surge`` and ``far`` are the rules' limits."""
        explosive = self.policy.when != "always" and "exploding" in self.policy.when
        if explosive and not self.on and self.history.rows - self._reserve >= LEAST_NORMS:
            self._set_bounds(0)
            self._reserve = self.history.rows
        clip = self.clip(self.history.rows) if self.on or explosive else None
        return DevicePlan(
            clip=clip if self.on else None,
            reserve=clip if not self.on and math.isinf(self._spared) else None,
            skip=self.policy.on_nonfinite != "ignore",
            surge=surge,
            far=far,
            loss_ceiling=self.history.next_loss_ceiling(),
            skip_above=self._skip_above,
            rate=self.further.rate,
        )

    # What to do.

    def decide(self, row: Row, incident: Incident | None) -> Decision:
        """Return what to do with the gradients of ``row``, before the optimizer sees them.

        ``incident`` is the open explosion, if there is one.

        Raises:
            TrainingUnstableError: too many steps in a row had to be skipped, or all measures failed and the last is to stop.
        """
        if self.record is None and incident is not None and self._switches_on(incident, row):
            self._begin(row, incident.clip)
        if row.poisoned:
            return self._skip(row) if self.policy.on_nonfinite != "ignore" else NOTHING
        if self.record is not None and self._effect.unlearned is not None:
            self._spare(row.step)
        if self.record is not None:
            self._go_further(row, incident)
        skips = self._skips_in_a_row.get(row.optimizer, 0)
        if row.global_norm > self._skip_above and skips < self.policy.max_skips:
            self._skips_in_a_row[row.optimizer] = skips + 1
            return Decision(skip=True)
        self._skips_in_a_row[row.optimizer] = 0
        # an average of norms must not miss what the ring forgets
        clip = self.clip(self.history.rows - 1) if self.on or self._begin_to_catch_up() else None
        if not self.acts:
            return NOTHING
        guard = None
        if self.record is not None and self.policy.threshold == "auto":
            guard = Guard.of(row, self.history, self._usual, self._looseness)
        return Decision(clip if self.on else None, rate=self.further.rate, guard=guard)

    def _begin_to_catch_up(self) -> bool:
        behind = self._baseline is not None and self.history.rows - self._looked >= self.history.window // 2
        if behind:
            self._looked = self.history.rows
        return behind

    def _switches_on(self, incident: Incident, row: Row) -> bool:
        least: Severity = "notice" if self.relapses(row.step) else self.policy.severity
        enough = SEVERITIES.index(incident.severity) >= SEVERITIES.index(least) and not row.global_norm <= self._spared
        return enough and self.policy.when != "always" and incident.kind in self.policy.when

    def relapses(self, step: int) -> bool:
        """True where an explosion at ``step`` is the last one come back: then the signs alone are enough."""
        return step - self._released <= _RELAPSE * self.policy.hold

    def _begin(self, row: Row, earlier: ClipRecord | None) -> None:
        before, scatter = self.history.loss_level()
        before = before if math.isfinite(before) else row.loss
        # a run that began with the explosion is well only when it has learned something since
        young = self.history.losses < _LEVEL
        self._well_below = before - abs(before) / 10 if young else before + max(scatter, abs(before) / 20)
        if self.relapses(row.step):
            self._hold = min(2 * self._hold, 8 * self.policy.hold)
        else:
            self._hold = self.policy.hold
            self._set_bounds(1)
            typical = self.history.typical_grad
            self._usual = np.where(typical.seen >= SETTLED, typical.value, np.nan)
        told = (str(earlier),) if earlier is not None else ()  # it was let go in this same incident
        self.record = ClipRecord(str(self._bounds), row.step, loss_before=before, family=row.family, measures=told)
        self._held_since, self._idle = row.step, 0
        self._effect = ClipEffect(self._well_below)
        self._looseness, self._loss_ceiling = 1.0, math.inf
        self._judged, self._judged_at, self._judged_level, self._promised = self.record, row.step, math.inf, 0.0
        self.further.begin()

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to ``row``'s gradients; ``coefficient`` is norm after over norm before."""
        clipped = decision.clip is not None and coefficient < 1.0
        self.clipped += clipped
        self.skipped += decision.skip
        self._idle = 0 if clipped or decision.skip else self._idle + 1
        if self.record is None:
            return
        if not decision.skip and not row.poisoned:
            promise = self.history.promise
            self._promised += coefficient * (np.nansum(promise) if np.isfinite(promise).any() else math.nan)
            self._effect.take(row.loss, row.global_norm, clipped=clipped)
        norm = row.global_norm
        record = replace(
            self.record,
            steps=self.record.steps + 1,
            clipped=self.record.clipped + clipped,
            skipped=self.record.skipped + decision.skip,
            loss_after=row.loss,
        )
        if math.isfinite(norm) and not norm <= record.norm_before:
            record = replace(record, norm_before=norm, norm_after=0.0 if decision.skip else norm * coefficient)
        self.record = self._changed = record

    def take_changed(self) -> ClipRecord | None:
        """Return the record that belongs to the open explosion, once after each change; else None."""
        changed, self._changed = self._changed, None
        return changed

    # Letting go.

    def abandon(self, step: int) -> None:
        """End without a claim, because auto-clip acts no longer."""
        if self.record is not None:
            self._changed = replace(self.record, released_step=step)
            self.record = None

    def _spare(self, step: int) -> None:
        """Let go at once: clipping does harm to the very steps that it clips."""
        assert self.record is not None
        unlearned, self._spared = self._effect.unlearned, max(self._spared, self._effect.largest_norm)
        record = replace(self.record, unlearned=unlearned, released_step=step, helped=False)
        record = replace(record, loss_after=self.history.loss_level(_LEVEL)[0], norm_before=self._spared)
        self.record, self._changed, self._looseness = None, record, 1.0

    def try_to_let_go(self, step: int, calm: int) -> bool:
        """Loosen a clip that still bites after ``calm`` calm steps; True when the run needs it no more."""
        if self.record is None:
            return calm >= self.policy.hold
        if min(calm, step - self._held_since) < self._hold:
            if self._looseness > 1.0:
                self._tighten(step)
            return False
        level, scatter = self.history.loss_level(_LEVEL)
        # under Adam and its kin a clip that stays is of no use anyway
        if level > self._well_below and calm < _LONG * self._hold and self.record.family != "adam":
            return False  # calm, but the harm is still there: letting go now would add to it
        if self._idle >= (self._hold if self._looseness == 1.0 else _IDLE):
            return True
        if level > self._loss_ceiling:
            self._tighten(step)
            return False
        if math.isfinite(level):
            self._loss_ceiling = min(self._loss_ceiling, level + max(abs(level), 3 * scatter))
        self._looseness *= _LOOSEN
        return False

    def _tighten(self, step: int) -> None:
        """Go back to the bounds, for twice as long: letting go did harm."""
        self._looseness, self._loss_ceiling = 1.0, math.inf
        self._hold, self._held_since = 2 * self._hold, step

    def let_go(self, step: int) -> ClipRecord | None:
        """Switch off because the incident closes; return the finished record."""
        if self.record is None:
            return None
        after, _ = self.history.loss_level(_LEVEL)
        # where no loss was seen nothing speaks against it: the run became calm
        damage = self._damage()
        helped = not damage and (not math.isfinite(self.record.loss_before) or after <= self._well_below)
        record = replace(
            self.record,
            released_step=step,
            helped=helped,
            damage=damage,
            loss_after=after,
            recovered_after=self._recovery(self.record.from_step) if helped else None,
        )
        self.record, self._looseness, self._released = None, 1.0, step
        return record

    def _recovery(self, start: int) -> int | None:
        """Return the steps from ``start`` to the last loss above its level before the incident, and one more."""
        losses, steps = self.history.loss(), self.history.steps()
        losses = losses[steps >= start]
        above = np.flatnonzero(~(losses <= self._well_below))
        return None if not losses.size else int(above[-1]) + 1 if above.size else 0

    # Going further.

    @property
    def _skip_above(self) -> float:
        """The norm above which a step is left out, once that is allowed; a young run has no such norm."""
        if self.record is None or not self.further.skips or math.isnan(self._typical):
            return math.inf
        return SURGE * self._typical

    def _go_further(self, row: Row, incident: Incident | None) -> None:
        """Where the loss has not come down for ``patience`` steps: a lower threshold, then what else the policy allows.

        A clip that bites on most steps gives them all one length. Where they promised to lower the loss by more than all of
        it, and kept less than a quarter, that length is too long; where they promised little it is not, however slow.
        """
        assert self.record is not None
        if row.step - self._judged_at < self.policy.patience or self._looseness > 1.0:
            return
        level, _ = self.history.loss_level(_LEVEL)
        fell, promised = self._judged_level - level, self._promised
        falls, well = level < _FALLS * self._judged_level, not level > self._well_below
        steps, clipped = self.record.steps - self._judged.steps, self.record.clipped - self._judged.clipped
        self._judged, self._judged_at, self._promised = self.record, row.step, 0.0
        self._judged_level = min(level, self._judged_level)
        if falls or (well and clipped < _BITES * steps):
            return
        too_long = not well if math.isnan(promised) else promised >= level and fell <= _KEPT * promised
        # an optimizer of Adam's kind moves as far by a small gradient as by a large one
        narrows = self.policy.threshold == "auto" and self._narrowed > _NARROWEST and row.family != "adam"
        if narrows and too_long:
            self._narrowed /= 2
            self._bounds = self._bounds.loosened(1 / 2)
            self.record = replace(self.record, clip=str(self._bounds))
        elif self.further.left and not well:
            began = incident.opened_step if incident is not None else self.record.from_step
            done = self.further.go_on(row, began, self._well_below, level)
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
                "the weights themselves are not finite, so no later step can be better; go back to a checkpoint"
                if weights
                else "no batch since then gave finite gradients; look at the loss and the data of this step"
            )
            raise TrainingUnstableError(
                f"{what}, after {skips - 1} steps in a row whose gradients were kept from this optimizer, of at most "
                f"{self.policy.max_skips}: {cause}. No gradient that is not finite was applied meanwhile."
            )
        return Decision(skip=True)
