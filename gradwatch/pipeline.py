"""The library on one page: row -> history -> rules -> alarms -> incidents -> auto-clip -> reports.

Imports no torch: a written series runs through it as a training does.
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
from gradwatch.history.columns import widened
from gradwatch.history.recurrence import task_became_harder
from gradwatch.history.schedule import Bounds, OwnTime, cadence
from gradwatch.history.statistics import quiet_numpy
from gradwatch.records import Alarm, Family, Incident, Row, Snapshot
from gradwatch.reports.desk import ReportDesk
from gradwatch.verdict.alarms import Alarms
from gradwatch.verdict.incidents import Incidents
from gradwatch.verdict.settings import VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.autoclip.engine import AutoClipEngine
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.history.columns import Columns
    from gradwatch.history.history import History
    from gradwatch.records import Facts
    from gradwatch.reports import Report
    from gradwatch.reports.notes import Notes
    from gradwatch.rules import Rule

_EVERY_STEP = 64  # every rule judges each of the first steps: small models explode within 30
_KEPT = 2000  # changes of state of the rules
_SERIES = 400  # rows that a report gets for its curves
_SPEED_OVER = 0.2  # seconds over which the speed is taken
_NUMBERS = 1 << 20  # that fit into a float32
_NO_LOSS = 5  # rows without a loss after which the loss rules say that they rest


class Pipeline:
    """One run: the judge of its rows (`gradwatch.probe.judge.Judge`). Every row goes through `judge`.

    Args:
        history: the ring, made for the run's layers.
        rules: the rules to judge with.
        autoclip: None to only watch.
        reports: told of every change, and now and then in between.
        notes: takes what cannot be done, and parts that raise.
        own_time: the time that watching has taken so far; read for the reports.
        verdict: the verdict's own limits; None: its defaults.
        keep: how many changes of rules to keep; None: all.
    """

    def __init__(
        self,
        history: History,
        rules: Sequence[Rule],
        autoclip: AutoClipEngine | None,
        reports: Sequence[Report],
        notes: Notes,
        own_time: OwnTime | None = None,
        verdict: VerdictSettings | None = None,
        keep: int | None = _KEPT,
    ) -> None:
        self.history = history
        self.rules = tuple(rules)
        self.verdict_settings = verdict or VerdictSettings()
        self.alarms = Alarms(rules, history.layers, notes.part_failed)
        self.autoclip = autoclip
        self.incidents = Incidents(history, rules, self.verdict_settings, autoclip)
        self.armed = autoclip is not None
        self.changes: deque[Alarm] = deque(maxlen=keep)
        self.notes = notes
        self._own_time = own_time or OwnTime()
        self._surge = next((rule.limit for rule in rules if rule.role == "surge"), math.inf)
        self._band = np.full(len(history.layers), np.inf)
        self._loss_band = math.inf
        self._started = perf_counter()
        self._timed = self._started
        self._timed_step = 0
        self._first_step: int | None = None
        self._speed = math.nan
        self.desk = ReportDesk(reports, notes, self.snapshot)

    # What is known of the run.

    def optimizer_found(self, name: str, family: Family) -> None:
        """Take note of an optimizer of the watched parameters that is about to make its first step."""
        self.history.know(replace(self.history.facts, optimizer=name, family=family))

    def grown(self, columns: Columns, facts: Facts) -> None:
        """Take the columns of layers that were added; each is looked at on every step until it has a typical norm."""
        self.history.grow(columns)
        self.alarms.grow(self.history.layers)
        self.incidents.grow()
        self._band = widened(self._band, len(self.history.layers), 0.0)
        known = self.history.facts
        self.history.know(replace(known, layers=facts.layers, parameters=facts.parameters, depth=facts.depth))

    def note(self, text: str) -> None:
        """Say once what cannot be done."""
        self.notes.add(text)

    def part_failed(self, part: str, error: Exception) -> None:
        """Note that a part of gradwatch raised and is switched off; raise its error when strict."""
        self.notes.part_failed(part, error)

    # One row.

    def judge(self, row: Row) -> Decision:
        """Judge one row; return what to do with its gradients before the optimizer sees them.

        `done` follows, unless that is nothing.

        Raises:
            TrainingUnstableError: auto-clip's policy is to stop here.
        """
        self.history.push(row)
        self.desk.row(row)
        try:
            if self._is_quiet(row):
                decision = self._decide(row)
            else:
                with quiet_numpy():
                    self._apply_rules(row)
                    decision = self._decide(row)
        except TrainingUnstableError:
            self.desk.show()
            raise
        self.history.learn()
        if decision is NOTHING:
            self.desk.show()
        return decision

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to a row's gradients; ``coefficient`` is norm after over norm before."""
        if self.autoclip is not None and decision is not NOTHING:
            self.history.amend(coefficient=coefficient, skipped=decision.skip)
            self.autoclip.done(row, decision, coefficient)
            self._record_clip()
        self.desk.show()

    def _decide(self, row: Row) -> Decision:
        if self.autoclip is None or not self.armed:
            return NOTHING
        decision = self.autoclip.decide(row, self.incidents.treatable_explosion())
        self._record_clip()
        self.notes.extend(self.autoclip.further.take_news())
        return decision

    def _record_clip(self) -> None:
        record = self.autoclip.take_changed() if self.autoclip is not None else None
        if record is not None:
            self.incidents.record_clip(record)

    def _is_quiet(self, row: Row) -> bool:
        """Whether no rule can have anything to say on this row that may not wait for its turn."""
        return not (
            self.history.task_rows <= _EVERY_STEP
            or self.history.rows % cadence(self.history.rows) == 0
            or self.alarms.stirring
            or self.alarms.waiting
            or self.exploding
            or self.is_unusual(row)
        )

    def is_unusual(self, row: Row) -> bool:
        """Whether a row is out of the ordinary, so that the weights should be looked at before they change again."""
        return (
            row.nonfinite is not None
            or (row.has_loss and not row.loss <= self._loss_band)
            or bool((row.grad_norm > self._band).any())
        )

    def bounds(self) -> Bounds | None:
        """Return what the coming rows may be and still go unjudged; None while each is judged."""
        if (
            self.history.task_rows < _EVERY_STEP
            or self.alarms.stirring
            or self.exploding
            or (self.autoclip is not None and self.armed and self.autoclip.acts)
        ):
            return None
        coming = self.history.rows + 1
        return Bounds(self.history, -coming % cadence(coming), self._band, self._loss_band, self.desk.next_due)

    def _apply_rules(self, row: Row) -> None:
        if self._first_step is None:  # what came before the first step is not the training's speed
            self._first_step = self._timed_step = row.step
            self._timed = perf_counter()
        if row.loss > self.history.largest_first_loss and task_became_harder(self.history):
            self.history.follow_task()
        changes = self.alarms.update(self.history, row.step)
        self.changes.extend(changes)
        self.notes.extend(f"{alarm}." for alarm in changes if alarm.sign == "clip" and alarm.state == "firing")
        self.desk.judged(changes, self.incidents.update(changes, row.step))
        # a layer without a typical norm yet is looked at whenever it has a gradient
        typical = self.history.typical_grad
        band = typical.value * np.maximum(self.verdict_settings.band, np.exp(4 * typical.scatter))
        self._band = np.nan_to_num(band, nan=0.0, posinf=np.inf)
        if row.has_loss:
            middle, spread = self.history.loss_level()
            self._loss_band = middle + 3 * max(spread, abs(middle) / 10)
        elif self.history.rows == _NO_LOSS and not self.history.losses:  # one of the first steps: all of them come here
            self.note("no loss seen: the loss rules rest. Hand it over with monitor.loss(loss).")

    # Auto-clip.

    @property
    def policy(self) -> AutoClip | None:
        """Auto-clip's policy; None when gradwatch only watches."""
        return self.autoclip.policy if self.autoclip is not None else None

    @property
    def exploding(self) -> bool:
        """True while an incident of an explosion is open."""
        return self.incidents.exploding

    @property
    def may_skip(self) -> bool:
        """True where a step may ever be left out."""
        return self.policy is not None and self.policy.skips

    @property
    def own_clip(self) -> bool:
        """True where auto-clip, armed or not, is by a clip of the user's own."""
        return self.policy is not None and self.policy.clip.own

    @property
    def may_clip(self) -> bool:
        """True while auto-clip may act by a clip of the user's own; alike in processes that hold the same rows."""
        if not self.own_clip or self.policy is None or not self.armed:
            return False
        return self.policy.when == "always" or self.exploding

    def plan(self) -> DevicePlan | None:
        """Return what to do with the coming step, before its numbers are known; None: only watch it."""
        if self.autoclip is None or not self.armed:
            return None
        with quiet_numpy():
            return self.autoclip.plan(self._surge, self.verdict_settings.far * self._surge)

    def disarm(self, reason: str) -> None:
        """Only watch from here on, and say why: auto-clip does not act, and claims nothing."""
        self.armed = False
        self.history.know(replace(self.history.facts, clips_always=False))
        if self.autoclip is not None:
            self.autoclip.abandon(self.history.row.step)
            self._record_clip()
        self.note(reason)

    # Several processes.

    def follow_peers(self, lag: int) -> None:
        """Take note that several processes decide together, who know of each other's failures ``lag`` rows later; 0: no more."""
        self.alarms.follow_peers(lag)

    @property
    def failed_rules(self) -> int:
        """The rules that failed here, a bit for each."""
        return self.alarms.failed

    @property
    def decided(self) -> int:
        """A number of what auto-clip has decided so far; processes that train together compare it."""
        if self.autoclip is None or not self.armed:
            return 0
        return hash((self.autoclip.on, self.autoclip.clipped, self.autoclip.skipped)) % _NUMBERS

    def switch_off(self, rules: int) -> None:
        """Switch off the rules that failed in any process, a bit for each."""
        for rule in self.alarms.switch_off(rules):
            self.note(
                f"rule {rule} failed in another process, whose output has the cause: it is switched off here too."
            )

    # What is shown.

    def snapshot(self, news: tuple[Incident, ...] = ()) -> Snapshot:
        """Return all that a report may know of this moment; ``news`` are the incidents that changed since the last one."""
        history, now = self.history, perf_counter()
        step = history.row.step
        if now - self._timed >= _SPEED_OVER and step > self._timed_step:
            self._speed = (step - self._timed_step) / (now - self._timed)
            self._timed, self._timed_step = now, step
        closeness, closest = self.alarms.closeness()
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
            clipping=str(self.autoclip.policy.clip) if self.autoclip is not None else None,
            clip_on=self.autoclip is not None and self.armed and self.autoclip.on,
            clipped=self.autoclip.clipped if self.autoclip is not None else 0,
            skipped=self.autoclip.skipped if self.autoclip is not None else 0,
            seconds=now - self._started,
            steps_per_second=self._speed,
            cost_us=1e6 * self._own_time.seconds / max(step - (self._first_step or 0) + 1, 1),
            provenance=history.row.provenance,
            notes=tuple(self.notes.all),
            news=news,
            clip_coefficient=float(history.clip_coefficient(last=1)[-1]) if history.rows else 1.0,
        )

    @property
    def verdict(self) -> str:
        """The run in one word: ``"healthy"``, or the verdict of the gravest open incident."""
        found = [incident.verdict for incident in self.incidents.open if incident.severity != "notice"]
        return "confirmed" if "confirmed" in found else "suspected" if found else "healthy"
