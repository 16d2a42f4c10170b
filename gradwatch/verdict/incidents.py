"""Signs -> verdict. Alarms of one story become one incident: what happened, where it began, how sure that is.

Four kinds (exploding, spike, nonfinite, diverging) are chapters of one story, the explosion; each of the silent kinds
is a story of its own. An incident opens with the first sign that may open one, is confirmed when a confirming sign
stands beside a subtle, growth or numeric one, and closes when the run has been calm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gradwatch.history.losses import EARLY
from gradwatch.history.recurrence import is_of_the_batch
from gradwatch.history.statistics import doubling, median_and_mad
from gradwatch.records import EXPLOSION, SEVERITIES, Alarm, ClipRecord, Incident, Kind, Phase, Severity, Verdict
from gradwatch.verdict.advice import advise
from gradwatch.verdict.suspects import Suspects

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Floats, Role
    from gradwatch.rules import Rule
    from gradwatch.verdict.settings import VerdictSettings

_KEPT = 1000  # incidents of a run
_TREND = 8  # steps of which growth is told
_QUICK = 50.0  # steps within which gradients double, for growth to be worth a forecast


@dataclass
class _Story:
    """Working state of one open (or not yet opened) incident."""

    firing: dict[tuple[str, str | None], Alarm] = field(default_factory=dict)
    signs: dict[tuple[str, str | None], Alarm] = field(default_factory=dict)
    incident: Incident | None = None
    place: int = -1
    fired_steps: int = 0
    last_fired: int = -1
    ceiling: float = math.nan
    peak: float = math.nan
    jumped: bool = False
    of_the_batch: bool = False  # opened by a jump that the last update cannot have made
    young: bool = False  # and when the run had no level yet that a loss could stay above
    look_at: int = 0
    level: float = math.nan
    lasting: bool = False
    harmed: bool = False
    odd_steps: set[int] = field(default_factory=set)
    ranks: tuple[int, ...] = ()
    findings: list[str] = field(default_factory=list)


class Treatment(Protocol):
    """What is done about an explosion, and keeps its incident open."""

    def relapses(self, step: int) -> bool:
        """True where an explosion at ``step`` is the last one come back."""

    def try_to_let_go(self, step: int, calm: int) -> bool:
        """Do less, after ``calm`` calm steps; True when the run needs nothing more."""

    def let_go(self, step: int) -> ClipRecord | None:
        """The incident closes: end, and return what was done."""


class Incidents:
    """The incidents of a run, in opening order (`all`: the last 1,000), and the state behind the open ones.

    Args:
        history: read for the order of layers, the loss and the model's facts.
        rules: those whose alarms come; read for what they are to the verdict.
        settings: the verdict's own limits.
        treatment: what is done about an explosion, which keeps it open until it has let go; None: nothing is.
    """

    def __init__(
        self,
        history: History,
        rules: Sequence[Rule],
        settings: VerdictSettings,
        treatment: Treatment | None = None,
    ) -> None:
        self._history = history
        self._settings = settings
        self._opening = frozenset(rule.code for rule in rules if rule.opens)
        self._role = {rule.code: rule.role for rule in rules}
        self._remedies = {rule.code: rule.remedy for rule in rules}
        self._treatment = treatment
        self._suspects = Suspects(history, settings.band)
        self._stories: dict[str, _Story] = {}
        self._order: list[str] = []
        self._told = 0
        self.all: list[Incident] = []

    def grow(self) -> None:
        """Take the columns of layers that were added."""
        self._suspects.grow()

    @property
    def open(self) -> list[Incident]:
        """The incidents that are not closed."""
        return [story.incident for story in self._stories.values() if story.incident is not None]

    def open_explosion(self) -> Incident | None:
        """The open incident of the explosion story, if there is one."""
        story = self._stories.get("explosion")
        return story.incident if story else None

    def treatable_explosion(self) -> Incident | None:
        """The same, unless the data or the task made it: no clip brings down a loss that gradients have not raised."""
        story = self._stories.get("explosion")
        return None if story is None or (story.of_the_batch and not story.harmed) else story.incident

    @property
    def exploding(self) -> bool:
        """True while an incident of the explosion story is open."""
        return self.open_explosion() is not None

    def update(self, changes: Iterable[Alarm], step: int) -> list[Incident]:
        """Take the alarms that changed; return what is new."""
        self._suspects.follow(step)
        touched = set()
        for alarm in changes:
            name: str = "explosion" if alarm.kind in EXPLOSION else alarm.kind
            story = self._stories.setdefault(name, _Story())
            key = (alarm.code, alarm.layer)
            if alarm.state == "firing":
                story.firing[key] = alarm
                story.signs.setdefault(key, alarm)
            else:
                story.firing.pop(key, None)
            touched.add(name)
        news = []
        for name in list(self._stories):
            new = self._judge(name, self._stories[name], step, touched=name in touched)
            if new is not None:
                news.append(new)
        return news

    def record_clip(self, record: ClipRecord) -> None:
        """Attach what auto-clip did to the open explosion."""
        story = self._stories.get("explosion")
        if story is not None and story.incident is not None:
            self._replace(story, replace(story.incident, clip=record))

    def _judge(self, name: str, story: _Story, step: int, *, touched: bool) -> Incident | None:
        active = any(code in self._opening for code, _ in story.firing)
        aftermath = name != "explosion" and self.open_explosion() is not None  # part of the explosion's own story
        if story.incident is None and (aftermath or not active):
            story.signs, story.fired_steps = dict(story.firing), 0
            return None
        if active:
            story.last_fired = step
            story.fired_steps += 1
            if name == "explosion" and not story.harmed and (self._relapses(step) or self._harm(story)):
                story.harmed = touched = True
            if story.incident is None:
                jumped = any(sign.kind == "spike" for sign in story.firing.values())
                if name == "explosion" and not (story.harmed or jumped):
                    return None  # growth while the loss is well: a sign to keep, not a story to tell
                touched = True
                story.ceiling, story.peak = self._history.loss_ceiling(last=1), self._history.row.loss
                story.jumped = self._has("jump", story.firing.values())
                story.look_at = self._settings.lasting_steps
                story.of_the_batch = step in story.odd_steps
                story.young = self._history.losses < EARLY and story.of_the_batch
        may_last = not story.lasting and (story.harmed or not story.young)
        if story.incident is not None and may_last and step - story.incident.opened_step >= story.look_at:
            story.lasting = self._compare_level(story)
            story.look_at *= 2
            touched |= story.lasting
        if not active and self._over(name, step, calm=step - story.last_fired):
            return self._close(name, story, step)
        if not touched:
            return None
        return self._tell(story, step)

    def _compare_level(self, story: _Story) -> bool:
        """Look 12, 24, 48 ... steps after the opening: True when the loss is up and no longer comes down.

        Up is twice what was usual. A loss that comes down is a change of the task. At first half of the way back is enough,
        counted in logarithms, later two thirds of it; farther up, a fifth less than at the look before.
        """
        level, _ = self._history.loss_level(story.look_at - 2)
        before, story.level = story.level, level
        if not level > max(story.ceiling, 2 * story.ceiling):  # of a negative loss, the ceiling itself
            return False
        first = self._settings.lasting_steps
        if story.look_at == first:
            after = self._history.task_loss(last=first)
            before, _ = median_and_mad(after[: first // 2])
            level, _ = median_and_mad(after[first // 2 :])
        way = 1 / 2 if story.look_at == first else 1 / 3
        back = story.ceiling * (story.peak / story.ceiling) ** way if 0 < story.ceiling < story.peak else -math.inf
        return not (level < back or before - level > abs(before) / 5)

    def _harm(self, story: _Story) -> bool:
        """Growth alone may be learning that begins; beside a loss that suffers, or far beyond its limit, it is not.

        A loss that jumped farther than the last update can have thrown it says nothing of the training: it is the batch's, and
        so is what surged in the same step, unless the update that is about to be made from it is too long.
        """
        signs, now = story.firing.values(), self._history.row.step
        too_long = self._has("update", signs) or self._has("overshoot", signs)
        if not too_long and is_of_the_batch(self._history):
            story.odd_steps.add(now)
        told = [sign for sign in signs if sign.step not in story.odd_steps]
        return (
            any((sign.sign == "subtle" and sign.kind != "spike") or sign.sign == "numeric" for sign in signs)
            or any(sign.kind == "nonfinite" for sign in signs)
            or any(sign.kind == "spike" and sign.step == now for sign in told)
            or (now not in story.odd_steps and self._history.loss_is_rising())
            or self._far_beyond(told)
            # early on, only the update that is about to be made can be told, and only before it is made; one layer alone
            # does not multiply
            or (
                self._history.losses < EARLY
                and self._history.row.family != "other"
                and np.count_nonzero(self._history.matrices & self._history.arriving) > 1
                and self._has("update", signs)
            )
            or any(
                self._role[sign.code] == "overshoot"
                and (self._history.losses < EARLY or self._history.row.step - sign.step >= EARLY)
                for sign in signs
            )
        )

    def _has(self, role: Role, signs: Iterable[Alarm]) -> bool:
        return any(self._role[sign.code] == role for sign in signs)

    def _relapses(self, step: int) -> bool:
        return self._treatment is not None and self._treatment.relapses(step)

    def _far_beyond(self, signs: Iterable[Alarm]) -> bool:
        """A surge so large that it speaks for itself: in some layers only, or while the loss is up.

        Where a plateau ends, most layers surge together while the loss is at its level or falls.
        """
        times = self._settings.far * (
            1 if self._history.task_rows >= 2 * EARLY else 2
        )  # a few norms make no typical one
        far = [sign for sign in signs if self._role[sign.code] == "surge" and sign.value > times * sign.limit]
        if not far:
            return False
        middle, scatter = self._history.loss_level()
        return 2 * len(far) <= len(self._history.layers) or not self._history.row.loss <= middle + scatter

    def _falls(self, story: _Story) -> bool:
        """True when the loss, after it jumped, stays near where it jumped to or falls: the task may have changed."""
        history, confirmed = self._history, self._has("damage", story.firing.values())
        if not story.jumped or story.lasting or confirmed or history.row.loss > story.peak + abs(story.peak) / 4:
            return False
        assert story.incident is not None
        settled = history.row.step - story.incident.opened_step >= self._settings.lasting_steps
        return not (settled and bool((history.surge() > self._settings.settled).any()))

    def _over(self, name: str, step: int, calm: int) -> bool:
        if self._treatment is None or name != "explosion":
            return calm >= self._settings.calm_steps
        return self._treatment.try_to_let_go(step, calm)

    def _tell(self, story: _Story, step: int) -> Incident | None:
        """Bring the incident up to date with its signs; return it when its headline is another one."""
        before = story.incident
        signs = tuple(story.signs.values())
        kind = _kind([s for s in signs if story.harmed or s.sign != "growth"], lasting=story.lasting)
        if kind in ("exploding", "diverging") and before is not None and before.kind == "spike" and self._falls(story):
            kind = "spike"
        severity, verdict = _severity(signs, kind)
        if kind == "dead" and self._history.half_won:  # what learns all the same may do without them
            severity = "notice"
        if before is not None:
            severity = max(severity, before.severity, key=SEVERITIES.index)
        confirmed = before.confirmed_step if before is not None else None
        if confirmed is None and verdict == "confirmed":
            confirmed = step
        layers = self._suspects.layers(signs)
        phase = before.phase if before is not None and before.phase else _phase(self._history)
        moved, finding = self._suspects.moved() if before is None else (None, None)
        story.findings += [finding] if finding else []
        suspect = self._suspects.prime(signs, layers, phase, moved)
        if before is not None and before.suspect is not None and (before.kind == kind or phase is None):
            suspect = before.suspect
        evidence = self._evidence(signs, story)
        after = replace(
            before or Incident(kind, severity, verdict, opened_step=step, number=self._told),
            kind=kind,
            severity=severity,
            verdict=verdict,
            confirmed_step=confirmed,
            suspect=suspect,
            layers=layers,
            signs=signs,
            evidence=evidence,
            ranks=story.ranks,
            phase=phase,
        )
        after = replace(after, advice=advise(after, self._history, self._remedies))
        if before is None:
            self._make_room()
            self._told += 1
            story.place = len(self.all)
            self.all.append(after)
        self._replace(story, after)
        if before is not None and (before.kind, before.severity, before.verdict) == (kind, severity, verdict):
            return None
        return after

    def _replace(self, story: _Story, incident: Incident) -> None:
        story.incident = incident
        self.all[story.place] = incident

    def _make_room(self) -> None:
        """Forget the oldest closed incident where there are too many: a run of a million steps must not fill memory."""
        if len(self.all) < _KEPT:
            return
        oldest = next(index for index, incident in enumerate(self.all) if not incident.open)
        del self.all[oldest]
        for story in self._stories.values():
            story.place -= story.place > oldest

    def _close(self, name: str, story: _Story, step: int) -> Incident:
        assert story.incident is not None
        kind = story.incident.kind
        if (
            kind == "exploding"
            and story.fired_steps <= self._settings.brief_steps
            and "confirming" not in {s.sign for s in story.incident.signs}
        ):
            kind = "spike"
        clip = self._treatment.let_go(step) if self._treatment is not None and name == "explosion" else None
        closed = replace(
            story.incident, kind=kind, verdict="resolved", closed_step=step, clip=clip or story.incident.clip
        )
        self._replace(story, closed)
        self._stories[name] = _Story(firing=story.firing)
        return closed

    def _evidence(self, signs: Sequence[Alarm], story: _Story) -> tuple[str, ...]:
        lines = []
        for code in dict.fromkeys(sign.code for sign in signs):
            same = [sign for sign in signs if sign.code == code]
            more = f" (and {len(same) - 1} more layers)" if len(same) > 1 else ""
            lines.append(f"{same[0]}{more}")
        self._find(story)
        if any(sign.sign == "growth" for sign in signs):
            lines += forecast(self._history.global_norm(last=_TREND))
        return (*lines, *story.findings)

    def _find(self, story: _Story) -> None:
        """Keep what the first non-finite row says of its place: elements, and processes of a distributed training."""
        row = self._history.row
        if not story.findings and row.counts:
            layer = self._history.first_nonfinite()
            index = self._history.layers.index(layer) if layer else -1
            if index in row.counts:
                nans, infs = row.counts[index]
                story.findings.append(
                    f"first in backward order: {layer} with {nans} NaN and {infs} infinite "
                    f"of {int(self._history.sizes[index])} gradient elements at step {row.step}"
                )
        if not story.ranks and row.culprits is not None:
            story.ranks = row.culprits.ranks
            story.findings.append(f"{row.culprits} at step {row.step}")


def forecast(norms: Floats) -> list[str]:
    """Say when gradients that go on growing as they do will leave float16 and float32; nothing where they do not grow.

    ``norms`` (n,) are the last global norms, oldest first.
    """
    steps = doubling(norms)
    if not steps <= _QUICK or not 4 * norms[0] < norms[-1] < math.inf:
        return []
    room = {np.dtype(kind).name: float(np.finfo(kind).max / norms[-1]) for kind in (np.float16, np.float32)}
    until = [f"{name} in about {max(steps * math.log2(times), 1):.0f}" for name, times in room.items() if times > 1]
    if not until:
        return []
    return [f"gradients double every {steps:.1f} steps: at this growth they leave {' and '.join(until)} steps"]


def _kind(signs: Sequence[Alarm], *, lasting: bool) -> Kind:
    if signs[0].kind not in EXPLOSION:
        return signs[0].kind
    if any(sign.sign == "growth" for sign in signs):
        return "exploding"
    if any(sign.kind == "nonfinite" for sign in signs):
        return "nonfinite"
    return "diverging" if lasting or any(sign.kind == "diverging" for sign in signs) else "spike"


def _severity(signs: Sequence[Alarm], kind: Kind) -> tuple[Severity, Verdict]:
    found = {sign.sign for sign in signs}
    confirmed = "confirming" in found and bool(found & {"subtle", "growth", "numeric"})
    verdict: Verdict = "confirmed" if confirmed else "suspected"
    if any(sign.kind == "nonfinite" for sign in signs):
        return "critical", verdict
    if kind == "spike" or (kind == "stalled" and "silent" not in found):
        return "notice", verdict
    return ("critical" if confirmed else "warning"), verdict


def _phase(history: History) -> Phase | None:
    """Where values that are not finite were seen first: weight before loss before gradient, as data flow."""
    if history.nonfinite_weight.any():
        return "weight"
    if history.loss_nonfinite:
        return "loss"
    if (history.nonfinite > 0).any():
        return "gradient"
    return None
