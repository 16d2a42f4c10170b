"""The flow of a run: row -> history -> rules -> alarms -> incidents -> auto-clip -> reports.

Does not import torch, so that recorded series are processed exactly like a training.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.errors import TrainingUnstableError
from gradwatch.history.ending import how_it_stands
from gradwatch.history.in_use import clip_use_of, usual_norms_of
from gradwatch.history.losses import EARLY
from gradwatch.history.recurrence import task_became_harder
from gradwatch.history.schedule import Bounds, cadence
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import Alarm, Family, Incident, OwnTime, Row, RunVerdict, Snapshot
from gradwatch.reports.desk import ReportDesk
from gradwatch.text.wording import number
from gradwatch.verdict import Alarms, Band, Incidents, Resting, VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gradwatch.autoclip.engine import AutoClipEngine
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.history.columns import Columns
    from gradwatch.history.history import History
    from gradwatch.records import Behind, Facts, Origin, Role
    from gradwatch.reports import Report
    from gradwatch.reports.notes import Notes
    from gradwatch.rules import Rule

_EVERY_STEP = 64  # first rows that all rules judge: small models explode within 30
_KEPT = 2000  # alarms that are kept
_SERIES = 400  # rows that a report receives for its curves
_SPEED_OVER = 0.2  # seconds over which the speed is measured
_NUMBERS = 1 << 20  # bound of hashes, so that they are exact in float32
_IDLE = 100  # rows after which layers that never had a gradient are noted
_NO_LOSS = 5  # rows without a loss after which it is reported that the loss rules are inactive
_ANEW = 8  # optimizers, each for two steps at most, that are too many
_RISEN = 2  # rows whose losses are high already before an optimizer comes: it brings no new task then


class Pipeline:
    """The judge of the rows of one run (see `gradwatch.probe.judge.Judge`).

    Args:
        history: history of the run's layers.
        rules: rules to judge with.
        clipping: state of auto-clip; None: only watch.
        reports: reports to update with every change, and at intervals in between.
        notes: receives what cannot be done, and the errors of parts that raise.
        own_time: time that watching has taken so far, which the reports show.
        verdict: limits of the verdict; None: the defaults.
        keep: number of alarms to keep; None: all.
        broken: returns which weights and buffers are not finite, in words; empty if all are, as far as it is known.

    Attributes:
        alarms: state of the rules.
        incidents: incidents of the run.
        armed: True until auto-clip is disarmed; False if there is no auto-clip.
        changes: alarms so far, oldest first.
        desk: the reports and the run log.
    """

    def __init__(
        self,
        history: History,
        rules: Sequence[Rule],
        clipping: AutoClipEngine | None,
        reports: Sequence[Report],
        notes: Notes,
        own_time: OwnTime | None = None,
        verdict: VerdictSettings | None = None,
        keep: int | None = _KEPT,
        broken: Callable[[], str] = str,
    ) -> None:
        self.history = history
        self.verdict_settings = verdict or VerdictSettings()
        self.alarms = Alarms(rules, history.layers, notes.part_failed)
        self.clipping = clipping
        self.incidents = Incidents(history, rules, self.verdict_settings, clipping, broken)
        self.armed = clipping is not None
        self.changes: deque[Alarm] = deque(maxlen=keep)
        self.notes = notes
        self._resting = Resting(history, self.alarms, self.incidents.recurring, self.note)
        self._own_time = own_time or OwnTime()
        self._limits = {role: _limit(rules, role) for role in ("surge", "jump", "update", "overshoot")}
        self._made = 0  # new optimizers in a row, each of the layers of the one before
        self._told: set[str] = set()  # what was noted once: codes of clip signs, and mistakes
        self._band = Band(len(history.layers), self.verdict_settings.band)
        self._started = perf_counter()
        self._timed = self._started
        self._timed_step = 0
        self._first_step: int | None = None
        self._looked_for_idle = False
        self._newest = -1  # largest index of an optimizer so far
        self._speed = math.nan
        self.desk = ReportDesk(reports, notes, self.snapshot, history)

    # Facts of the run.

    def optimizer_found(self, name: str, family: Family, options: Mapping[str, str] | None = None) -> None:
        """Record the class, the family and the options of an optimizer of watched parameters."""
        known, now = self.history.facts, dict(options or {})
        if known.optimizer is not None and known.maximizes is not (now.get("maximize") == "True"):
            now.pop("maximize", None)  # one may lower the loss and another raise it, as for adversarial inputs
        self.history.know(replace(known, optimizer=name, family=family, optimizer_options=now))

    def loss_found(
        self, kind: str, prediction: tuple[int, ...] = (), behind: Behind = "more", *, mean: bool = False
    ) -> None:
        """Record what is known of the losses of the backwards so far; see `gradwatch.records.Facts`."""
        self.history.know(replace(self.history.facts, loss=kind, prediction=prediction, behind=behind, mean=mean))

    def losses_add_up(self) -> None:
        """Record that the loss of a row is the sum of those of several backwards."""
        if self.history.facts.behind != "more":
            self.history.know(replace(self.history.facts, behind="more"))

    def losses_oppose(self) -> None:
        """Record that two optimizers take turns, where the loss of one runs through what the other trains."""
        self.history.know(replace(self.history.facts, opposed_since=max(0, self.history.row.step)))
        self._resting.look()

    def grown(self, columns: Columns, facts: Facts) -> None:
        """Extend everything to the columns of added layers, whose gradients are judged until a typical norm is known."""
        self.history.grow(columns)
        self.alarms.grow(self.history.layers)
        self.incidents.grow()
        self._band.grow(len(self.history.layers))
        known = self.history.facts
        self.history.know(replace(known, layers=facts.layers, parameters=facts.parameters, depth=facts.depth))

    def found(self, origin: Origin) -> None:
        """Record the operation that made the first non-finite number of the step that is judged next."""
        self.incidents.record_origin(origin)

    def not_found(self, reason: str) -> None:
        """Record why the operation that made the step non-finite that is judged next is not known."""
        self.incidents.record_unknown(reason)

    def note(self, text: str) -> None:
        """Report once what gradwatch cannot do."""
        self.notes.add(text)

    def mistake(self, text: str) -> None:
        """Report once a mistake of the program that is certain; advice names it first."""
        known = self.history.facts
        if text not in known.mistakes:
            self.history.know(replace(known, mistakes=(*known.mistakes, text)))
            self.note(text)

    def part_failed(self, part: str, error: Exception) -> None:
        """Report that a part of gradwatch raised and is switched off; raise its error if strict."""
        self.notes.part_failed(part, error)

    # One row.

    def judge(self, row: Row) -> Decision:
        """Judge a row and return what to do with its gradients before the optimizer uses them.

        `done` must be called next, also if nothing is to be done: it shows the row to the reports.

        Raises:
            TrainingUnstableError: the policy of auto-clip is to stop the run here.
        """
        if row.begins_task:  # a replay: only what has made the rows knows it
            self.history.begin_next_task()
        self.history.push(row)
        if row.optimizer > self._newest:
            self._made = self._made + 1 if self._is_made_anew() else 0
            if self._made >= _ANEW and self.history.rows <= 2 * self._made:
                self._tell_made_anew()
            else:
                self._look_for_new_task(row)
        begins = self.history.task_rows == 1 < self.history.rows
        self.desk.row(row._replace(begins_task=True) if begins else row)
        try:
            if self._is_quiet(row):
                decision = self._decide(row)
            else:
                with ignore_fp_warnings():
                    self._apply_rules(row)
                    decision = self._decide(row)
        except TrainingUnstableError:
            self.desk.show()
            raise
        self.history.learn()
        return decision

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Record what was done to the gradients of a row, and show it; ``coefficient`` is the norm after over the norm before."""
        if self.clipping is not None and decision is not NOTHING:
            self.history.amend(coefficient=coefficient, skipped=decision.skip)
            self.clipping.done(row, decision, coefficient)
            self._record_clip()
        self.desk.show()

    def _decide(self, row: Row) -> Decision:
        if self.clipping is None or not self.armed:
            return NOTHING
        explosion = self.incidents.treatable_explosion(batches=self.clipping.policy.treats_spikes)
        decision = self.clipping.decide(row, explosion)
        self._record_clip()
        self.notes.extend(self.clipping.further.take_news())
        return decision

    def _record_clip(self) -> None:
        record = self.clipping.take_changed() if self.clipping is not None else None
        if record is not None:
            self.incidents.record_clip(record)

    def _is_quiet(self, row: Row) -> bool:
        """Return whether the rules need not judge this row, because nothing unusual or pending is known."""
        return not (
            self.history.task_rows <= _EVERY_STEP
            or self.history.rows % cadence(self.history.rows) == 0
            or self.alarms.stirring
            or self.alarms.waiting
            or self.exploding
            or row.buffers_well is False
            or self._band.is_left_by(row)
        )

    def is_unusual(self, row: Row) -> bool:
        """Return whether a row is out of the ordinary, so that the weights should be sampled before they change again."""
        return self._band.is_left_by(row)

    def bounds(self) -> Bounds | None:
        """Return the bounds within which the coming rows need not be judged; None while each row is judged."""
        if (
            self.history.task_rows < _EVERY_STEP
            or self.alarms.stirring
            or self.exploding
            or (self.clipping is not None and self.armed and self.clipping.acts)
        ):
            return None
        coming = self.history.rows + 1
        return Bounds(
            self.history, -coming % cadence(coming), self._band.grad_norm, self._band.loss, self.desk.next_due
        )

    def _apply_rules(self, row: Row) -> None:
        if self._first_step is None:  # the time before the first step does not count for the speed
            self._first_step = self._timed_step = row.step
            self._timed = perf_counter()
        if row.loss > self.history.largest_first_loss and task_became_harder(self.history):
            self.history.follow_task()
        if not self._looked_for_idle and self.history.rows >= _IDLE:
            self._looked_for_idle = True
            self._note_idle_layers()
        changes = self.alarms.update(self.history, row.step)
        self.changes.extend(changes)
        for alarm in changes:
            if alarm.sign == "clip" and alarm.state == "firing" and alarm.code not in self._told:
                self._told.add(alarm.code)
                self.note(f"{alarm}.")
        self._look_for_mistakes()
        news = self.incidents.update(changes, row.step)
        if news:
            self.history.know_explosions(self.incidents.explosions, self.incidents.destructive)
        self.desk.judged(changes, news)
        self._resting.look()
        self._band.follow(self.history)
        if not row.has_loss and self.history.rows == _NO_LOSS and not self.history.losses:
            # all of the first rows are judged, so this one is
            self.note("no loss seen: the loss rules are inactive. Pass it with monitor.loss(loss).")

    def _look_for_mistakes(self) -> None:
        if self.history.goes_uphill and "rate" not in self._told:
            self._told.add("rate")
            self.mistake(
                f"the learning rate was below zero at step {self.history.row.step}, and such updates raise the loss: check the "
                "schedule, which may have run past its end."
            )
        if self.history.is_no_entropy:
            binary = self.history.facts.loss == "binary cross-entropy"
            self.mistake(
                "the binary cross-entropy is below zero: some targets are not between 0 and 1, such as labels of 1 and 2."
                if binary
                else "the cross-entropy is below zero: nll_loss got numbers that are no log-probabilities. Apply log_softmax "
                "before it, or use cross_entropy."
            )
        if self.history.is_raised:
            facts = self.history.facts
            how, out = f"the {facts.loss} has a minus sign", "the minus sign"
            if facts.maximizes:
                how, out = f"{facts.optimizer} was made with maximize=True", "maximize"
            self.mistake(f"{how}: each step raises the {facts.loss}. Leave {out} out, unless that is meant.")

    def _is_made_anew(self) -> bool:
        """Return whether a new optimizer of the layers of the last step has lost what that one knew."""
        held, before = np.isfinite(self.history.rate), np.isfinite(self.history.previous_rate)
        kept = self.history.facts.momentum > 0 or self.history.facts.betas is not None
        return kept and bool(held.any()) and np.array_equal(held, before)

    def _tell_made_anew(self) -> None:
        """Tell of a program that makes an optimizer for each step or two, and leave new ones alone from now on."""
        self._newest = self.history.row.optimizer
        if "optimizers" not in self._told:
            self._told.add("optimizers")
            self.mistake(
                f"the program has made {self._made} optimizers for {self.history.rows} steps: each begins without momentum, and "
                "without the averages of Adam. Make one before the loop."
            )

    def _look_for_new_task(self, row: Row) -> None:
        """Begin a new task if a new optimizer makes its first step at a loss far above the usual, which it cannot have raised."""
        first, self._newest = self._newest < 0, row.optimizer
        earlier = self.history.loss(last=_RISEN + 1)[:-1]
        # of optimizers that take turns, each makes its first step early on
        if first or self.history.losses < EARLY or not row.loss > self._band.loss:
            return
        explosion = self.incidents.open_explosion()
        if (earlier > self._band.loss).all() or (explosion is not None and explosion.severity != "notice"):
            return
        usual, _ = self.history.loss_level()
        self.history.begin_task(row)
        self.note(
            f"a new optimizer makes its first step at step {row.step}, where the loss is {number(row.loss)}; it was about "
            f"{number(usual)}. This is taken for a new task, whose usual loss and norms are not known yet."
        )

    def _note_idle_layers(self) -> None:
        """Note the layers that an optimizer holds and that no gradient has ever reached."""
        norms = self.history.grad_norm()
        idle = np.isfinite(self.history.rate) & np.isnan(norms).all(axis=0) & (self.history.typical_grad.seen == 0)
        if self.history.row.arrived is not None:
            idle &= ~self.history.row.arrived
        names = [name for name, hit in zip(self.history.layers, idle, strict=True) if hit]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            rows, steps = self.history.rows, self.history.steps()
            each = steps[-1] - steps[0] == len(steps) - 1
            seen = f"{rows} steps" if each else f"{rows} measured steps"
            them, when = "it" if len(names) == 1 else "them", "" if each else " at these steps"
            self.note(
                f"no gradient has reached {', '.join(names[:3])}{more} in {seen} although an optimizer holds {them}: a detach(), "
                f"or a part that the loss does not use{when}."
            )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that it judges with."""
        return self.alarms.rules

    # Auto-clip.

    @property
    def policy(self) -> AutoClip | None:
        """The policy of auto-clip; None if gradwatch only watches."""
        return self.clipping.policy if self.clipping is not None else None

    @property
    def exploding(self) -> bool:
        """True while an incident of an explosion is open."""
        return self.incidents.exploding

    @property
    def may_skip(self) -> bool:
        """True if the policy allows steps to be left out."""
        return self.policy is not None and self.policy.skips

    @property
    def own_clip(self) -> bool:
        """True if the clip of auto-clip, armed or not, is a class written by the user."""
        return self.policy is not None and self.policy.clip.own

    @property
    def may_clip(self) -> bool:
        """True while auto-clip may act by a clip written by the user. It is the same in processes with the same rows."""
        if not self.own_clip or self.policy is None or not self.armed:
            return False
        return self.policy.when == "always" or self.exploding

    def plan(self, ahead: int = 0) -> DevicePlan | None:
        """Return what to do with the coming step before its values are known; None: only watch it.

        ``ahead`` is the number of steps that were made since the last row that was judged.
        """
        if self.clipping is None or not self.armed:
            return None
        with ignore_fp_warnings():
            far = self.verdict_settings.far * self._limits["surge"]
            return self.clipping.plan(**self._limits, far=far, ahead=ahead)

    def disarm(self, reason: str) -> None:
        """Stop auto-clip for the rest of the run and report the reason."""
        self.armed = False
        self.history.know(replace(self.history.facts, clips_always=False))
        if self.clipping is not None:
            self.clipping.abandon(self.history.row.step)
            self._record_clip()
        self.note(reason)

    # Several processes.

    def follow_peers(self, lag: int) -> None:
        """Set after how many rows the processes know of each other's failures; 0: this process decides alone."""
        self.alarms.follow_peers(lag)

    @property
    def failed_rules(self) -> int:
        """The rules that failed in this process, one bit each."""
        return self.alarms.failed

    @property
    def decided(self) -> int:
        """A hash of the decisions of auto-clip so far, which processes that train together compare."""
        if self.clipping is None or not self.armed:
            return 0
        return hash((self.clipping.on, self.clipping.clipped, self.clipping.skipped)) % _NUMBERS

    def switch_off(self, rules: int) -> None:
        """Switch off the rules that failed in any process, given as one bit each."""
        for rule in self.alarms.switch_off(rules):
            self.note(
                f"rule {rule} failed in another process, whose output shows the cause: it is switched off here too."
            )

    # Reports.

    def snapshot(self, news: tuple[Incident, ...] = ()) -> Snapshot:
        """Return the current state for a report; ``news`` are the incidents that changed since the last snapshot."""
        history, now = self.history, perf_counter()
        step = history.row.step
        if now - self._timed >= _SPEED_OVER and step > self._timed_step:
            self._speed = (step - self._timed_step) / (now - self._timed)
            self._timed, self._timed_step = now, step
        closeness, closest = self.alarms.closeness()
        explosion = self.incidents.open_explosion()
        return Snapshot(
            facts=history.facts,
            step=step,
            layers=history.layers,
            loss=history.loss(last=_SERIES).copy(),
            global_norm=history.global_norm(last=_SERIES).copy(),
            grad_norm=history.row.grad_norm.copy(),
            nonfinite=history.nonfinite.copy(),
            weight_norm=history.weight.copy(),
            closeness=closeness,
            closest=closest,
            rules=tuple(f"{rule.code} {rule.name}" for rule in self.rules),
            firing=self.alarms.firing_rules(),
            incidents=tuple(self.incidents.all),
            verdict=self.verdict,
            clipping=self.clipping.called if self.clipping is not None else None,
            clip_on=self.clipping is not None and self.armed and self.clipping.on and not self.clipping.lifted,
            clipped=self.clipping.clipped if self.clipping is not None else 0,
            skipped=self.clipping.skipped if self.clipping is not None else 0,
            seconds=now - self._started,
            steps_per_second=self._speed,
            cost_us=1e6 * self._own_time.seconds / max(step - (self._first_step or 0) + 1, 1),
            provenance=history.row.provenance,
            notes=tuple(self.notes.all),
            news=news,
            ending=how_it_stands(history) if history.rows else "",
            clip_coefficient=float(history.clip_coefficient(last=1)[-1]) if history.rows else 1.0,
            usual_norms=usual_norms_of(history, None if explosion is None else explosion.opened_step),
            clip_use=clip_use_of(history, auto_clipped=self.clipping is not None and self.clipping.clipped > 0),
            scaled_up=self.clipping.scaled_up if self.clipping is not None else 0,
        )

    @property
    def verdict(self) -> RunVerdict:
        """The state of the run, one of `VERDICTS`. Notices count only where they have undone what was learned."""
        found = [incident.verdict for incident in self.incidents.open if incident.severity != "notice"]
        if found:
            return "confirmed" if "confirmed" in found else "suspected"
        against = any(one.speaks_against_run for one in (*self.incidents.open, *self.incidents.damaged))
        return "damaged" if against else "healthy"


def _limit(rules: Sequence[Rule], role: Role) -> float:
    """Return the limit of the rule with this role; infinity if there is none, so that nothing exceeds it."""
    return next((rule.limit for rule in rules if rule.role == role), math.inf)
