"""The library on one page: row -> history -> rules -> alarms -> incidents -> auto-clip -> reports.

Imports no torch: a written series runs through it as a training does.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.history.columns import widened
from gradwatch.history.recurrence import task_became_harder
from gradwatch.history.schedule import Bounds, cadence
from gradwatch.history.statistics import quiet_numpy
from gradwatch.records import Alarm, Incident, Row, Snapshot
from gradwatch.shutdown import Failure, all_done
from gradwatch.verdict.alarms import Alarms
from gradwatch.verdict.incidents import Incidents
from gradwatch.verdict.settings import VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.autoclip.engine import AutoClipEngine
    from gradwatch.history.columns import Columns
    from gradwatch.history.ring import History
    from gradwatch.reports import Report
    from gradwatch.rules import Rule
    from gradwatch.runlog.recording import Recording

_EVERY_STEP = 64  # every rule judges each of the first steps: small models explode within 30
_SERIES = 400  # rows that a report gets for its curves
_SPEED_OVER = 0.2  # seconds over which the speed is taken
_NUMBERS = 1 << 20  # that fit into a float32
_NO_LOSS = 5  # rows without a loss after which the loss rules say that they rest


class Pipeline:
    """One run. Every optimizer step goes through `step`.

    Args:
        history: the ring, made for the run's layers.
        rules: the rules to judge with.
        clipping: auto-clip, or None to only watch.
        reports: told of every change, and now and then in between.
        on_error: told of a part that raised; the part is switched off.
        verdict: the verdict's own limits; None: its defaults.
    """

    def __init__(
        self,
        history: History,
        rules: Sequence[Rule],
        clipping: AutoClipEngine | None,
        reports: Sequence[Report],
        on_error: Callable[[str, Exception], None],
        verdict: VerdictSettings | None = None,
    ) -> None:
        self.history = history
        self.verdict_settings = verdict or VerdictSettings()
        self.alarms = Alarms(rules, history.layers, on_error)
        self.clipping = clipping
        self.incidents = Incidents(history, rules, self.verdict_settings, self.clipping)
        self.armed = clipping is not None
        self.reports = list(reports)
        self.log: Recording | None = None
        self.changes: deque[Alarm] = deque(maxlen=2000)
        self.notes: list[str] = []
        self._surge = next((rule.limit for rule in rules if rule.role == "surge"), math.inf)
        self._on_error = on_error
        self._news: tuple[Incident, ...] = ()
        self._band = np.full(len(history.layers), np.inf)
        self._loss_band = math.inf
        self._started = perf_counter()
        self._timed = self._started
        self._timed_step = 0
        self._first_step: int | None = None
        self._speed = math.nan
        self._last: dict[int, float] = {}
        self._notes_told = 0
        self._shown = self.snapshot(0.0)

    def record(self, log: Recording) -> None:
        """Keep the run in a run log; it is the last of the reports."""
        self.log = log
        self.reports.append(log)

    def grow(self, columns: Columns) -> None:
        """Take the columns of layers that were added; each is looked at on every step until it has a typical norm."""
        self.history.grow(columns)
        self.alarms.grow(self.history.layers)
        self.incidents.grow()
        self._band = widened(self._band, len(self.history.layers), 0.0)

    def step(self, row: Row) -> Decision:
        """Judge one row; return what to do with its gradients before the optimizer sees them."""
        self.history.push(row)
        if self.log is not None:
            self._tell(self.log, "row", row)
        if self._quiet(row):
            decision = self._decide(row)
        else:
            with quiet_numpy():
                self._judge(row)
                decision = self._decide(row)
        if self.clipping is not None and self.clipping.further.news:
            self.notes += self.clipping.further.news
            self.clipping.further.news.clear()
        self.history.learn()
        return decision

    def _decide(self, row: Row) -> Decision:
        if self.clipping is None or not self.armed:
            return NOTHING
        decision = self.clipping.decide(row, self.incidents.treatable_explosion())
        self._record_clip()
        return decision

    def _record_clip(self) -> None:
        record = self.clipping.take_changed() if self.clipping is not None else None
        if record is not None:
            self.incidents.record_clip(record)

    def disarm(self) -> None:
        """Only watch from here on: auto-clip does not act, and claims nothing."""
        self.armed = False
        self.history.facts = replace(self.history.facts, clips_always=False)
        if self.clipping is not None and self.clipping.record is not None:
            self.incidents.record_clip(replace(self.clipping.record, released_step=self.history.row.step))
            self.clipping.record = None

    @property
    def decided(self) -> int:
        """A number of what auto-clip has decided so far; processes that train together compare it."""
        if self.clipping is None or not self.armed:
            return 0
        return hash((self.clipping.on, self.clipping.clipped, self.clipping.skipped)) % _NUMBERS

    @property
    def may_clip(self) -> bool:
        """True while auto-clip may act by a clip of the user's own; alike in processes that hold the same rows."""
        if not self.own_clip or self.clipping is None or not self.armed:
            return False
        return self.clipping.policy.when == "always" or self.incidents.exploding

    @property
    def own_clip(self) -> bool:
        """True where auto-clip, armed or not, is by a clip of the user's own."""
        return self.clipping is not None and self.clipping.policy.clip.own

    def orders(self) -> DevicePlan | None:
        """Return what to do with a step that is not known yet; None: only watch it."""
        if self.clipping is None or not self.armed:
            return None
        with quiet_numpy():
            return self.clipping.orders(self._surge, self.verdict_settings.far * self._surge)

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to the gradients."""
        if self.clipping is not None and decision is not NOTHING:
            self.history.amend(coefficient=coefficient, skipped=decision.skip)
            self.clipping.done(row, decision, coefficient)
            self._record_clip()

    def _quiet(self, row: Row) -> bool:
        """True on a step on which no rule can have anything to say that may not wait for its turn."""
        return not (
            self.history.task_rows <= _EVERY_STEP
            or self.history.rows % cadence(self.history.rows) == 0
            or self.alarms.stirring
            or self.alarms.waiting
            or self.incidents.open_explosion() is not None
            or self.startled(row)
        )

    def startled(self, row: Row) -> bool:
        """True when the row is out of the ordinary, so that the weights should be looked at before they change again."""
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
            or self.incidents.open_explosion() is not None
            or (self.clipping is not None and self.armed and self.clipping.acts)
        ):
            return None
        until = min(
            (self._last.get(id(report), -math.inf) + report.period for report in self.reports), default=math.inf
        )
        coming = self.history.rows + 1
        return Bounds(self.history, -coming % cadence(coming), self._band, self._loss_band, until)

    def _judge(self, row: Row) -> None:
        if self._first_step is None:  # what came before the first step is not the training's speed
            self._first_step = self._timed_step = row.step
            self._timed = perf_counter()
        if row.loss > self.history.largest_first_loss and task_became_harder(self.history):
            self.history.follow_task()
        changes = self.alarms.update(self.history, row.step)
        self.changes.extend(changes)
        if changes and self.log is not None:
            self._tell(self.log, "judged", changes)
        self.notes += [f"{alarm}." for alarm in changes if alarm.sign == "clip" and alarm.state == "firing"]
        self._news += tuple(self.incidents.update(changes, row.step))
        # a layer without a typical norm yet is looked at whenever it has a gradient
        typical = self.history.typical_grad
        band = typical.value * np.maximum(self.verdict_settings.band, np.exp(4 * typical.scatter))
        self._band = np.nan_to_num(band, nan=0.0, posinf=np.inf)
        if row.has_loss:
            middle, spread = self.history.loss_level()
            self._loss_band = middle + 3 * max(spread, abs(middle) / 10)
        elif self.history.rows == _NO_LOSS and not self.history.losses:  # one of the first steps: all of them come here
            self.notes.append("no loss seen: the loss rules rest. Hand it over with monitor.loss(loss).")

    # Reports.

    def start(self) -> None:
        """Tell the reports that watching begins."""
        self._each("start")

    def report(self, cost: float) -> None:
        """Show the reports a snapshot: at once when something is new, else when their period is over.

        ``cost`` is gradwatch's own time so far, in seconds.
        """
        if not self.reports:
            self._news = ()
            return
        now = perf_counter()
        told = bool(self._news) or len(self.notes) > self._notes_told
        due = [
            report for report in self.reports if told or now - self._last.get(id(report), -math.inf) >= report.period
        ]
        if not due:
            return
        snapshot = self._shown = self.snapshot(cost)
        self._news, self._notes_told = (), len(self.notes)
        for report in due:
            self._last[id(report)] = now
            self._tell(report, "step", snapshot)

    def raised(self, error: BaseException, cost: float) -> None:
        """The training raised: have the run log keep this moment."""
        if self.log is not None and self.history.rows:
            self._tell(self.log, "raised", error, self.snapshot(cost))

    def went_back(self) -> None:
        """The coming rows do not follow the last one: the run goes on from another step."""
        if self.log is not None:
            self._tell(self.log, "went_back")

    def flush(self, cost: float, timeout: float) -> bool:
        """Have the run log write all rows so far; False when it takes longer, or there is none."""
        if self.log is None or self.history.rows == 0:
            return False
        self._tell(self.log, "step", self.snapshot(cost))
        return self.log is not None and self.log.flush(timeout)

    def close(self, cost: float) -> list[Failure]:
        """Show the reports the last snapshot and end them, each whatever becomes of the others; return what failed."""

        def last() -> None:
            self._shown = self.snapshot(cost)

        failures = all_done([("the last snapshot", last)])
        snapshot = self._shown
        if failures:
            stale = f"this is the run as it was at step {snapshot.step}: its end could not be put together."
            snapshot = replace(snapshot, notes=(*snapshot.notes, stale))
        for report in tuple(self.reports):
            failed = all_done([(f"report {type(report).__name__}", partial(report.close, snapshot))])
            failures += failed
            if failed:
                all_done([("letting go", report.abandon)])  # it is told once that it failed
        self.reports.clear()
        return failures

    def _each(self, method: str, *arguments: Snapshot) -> None:
        for report in tuple(self.reports):
            self._tell(report, method, *arguments)

    def _tell(self, report: Report, method: str, *arguments: Any) -> None:
        try:
            getattr(report, method)(*arguments)
        except Exception as error:
            self.reports.remove(report)
            if report is self.log:
                self.log = None
            with suppress(Exception):  # it is told once that it failed
                report.abandon()
            self._on_error(f"report {type(report).__name__}", error)

    def snapshot(self, cost: float) -> Snapshot:
        """Return all that a report may know of this moment."""
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
            rules=tuple(f"{rule.code} {rule.name}" for rule in self.alarms.rules),
            firing=self.alarms.firing_rules(),
            incidents=tuple(self.incidents.all),
            verdict=self.verdict,
            clipping=str(self.clipping.policy.clip) if self.clipping is not None else None,
            clip_on=self.clipping is not None and self.armed and self.clipping.on,
            clipped=self.clipping.clipped if self.clipping is not None else 0,
            skipped=self.clipping.skipped if self.clipping is not None else 0,
            seconds=now - self._started,
            steps_per_second=self._speed,
            cost_us=1e6 * cost / max(step - (self._first_step or 0) + 1, 1),
            provenance=history.row.provenance,
            notes=tuple(self.notes),
            news=self._news,
            clip_coefficient=float(history.clip_coefficient(last=1)[-1]) if history.rows else 1.0,
        )

    @property
    def verdict(self) -> str:
        """The run in one word: ``"healthy"``, or the verdict of the gravest open incident."""
        found = [incident.verdict for incident in self.incidents.open if incident.severity != "notice"]
        return "confirmed" if "confirmed" in found else "suspected" if found else "healthy"
