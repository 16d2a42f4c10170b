"""Incidents: alarms that belong together, with the kind, the severity, the verdict and the prime suspect.

Four kinds (exploding, spike, nonfinite, diverging) are stages of one story, the explosion; each silent kind is a story of its
own. An incident opens with the first sign that may open one; growth signs also need a loss that suffers, or a value far
beyond their limit. It is confirmed when a confirming sign occurs together with a subtle, growth or numeric one, and it
closes when the run has been calm: resolved if nothing is worse than before the fault, else damaged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from gradwatch.history.losses import EARLY
from gradwatch.history.recurrence import is_of_the_batch, moved_by_another, was_one_batch
from gradwatch.records import EXPLOSION, SEVERITIES, Alarm, ClipRecord, Incident
from gradwatch.verdict.advice import advise
from gradwatch.verdict.aftermath import Aftermath, has_raised_loss
from gradwatch.verdict.causes import Causes
from gradwatch.verdict.counting import Counting
from gradwatch.verdict.damage import damage_since, is_undone
from gradwatch.verdict.evidence import Evidence
from gradwatch.verdict.gravity import Gravity
from gradwatch.verdict.harm import Harm
from gradwatch.verdict.opening import opening_of
from gradwatch.verdict.recurring import Recurring
from gradwatch.verdict.story import Story, kind_of, phase_of
from gradwatch.verdict.suspects import Suspects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Kind, Origin
    from gradwatch.rules import Rule
    from gradwatch.verdict.settings import VerdictSettings

_KEPT = 1000  # most incidents to keep
_ENDLESS = 2**62  # last step of an incident that is open


class Treatment(Protocol):
    """What is done about an explosion. It keeps the incident open until the treatment ends."""

    def try_to_let_go(self, step: int, calm: int) -> bool:
        """Reduce the treatment after ``calm`` calm steps; return True when the run needs no more of it."""

    def let_go(self, step: int) -> ClipRecord | None:
        """End the treatment because the incident closes, and return the record of what was done, if anything."""


class Incidents:
    """The incidents of a run in opening order, of which `all` holds the last 1,000, and the state of the open ones.

    Args:
        history: the history of the run, which is only read.
        rules: the rules whose alarms `update` receives.
        settings: the limits of the verdict.
        treatment: the treatment of explosions, which keeps them open until it has ended; None: there is none.
        broken: returns which weights and buffers are not finite, in words; empty if all are, as far as it is known.

    Attributes:
        recurring: the jumps of the loss that no update has caused.
    """

    def __init__(
        self,
        history: History,
        rules: Sequence[Rule],
        settings: VerdictSettings,
        treatment: Treatment | None = None,
        broken: Callable[[], str] = str,
    ) -> None:
        self._history = history
        self._settings = settings
        self._opening = frozenset(rule.code for rule in rules if rule.opens)
        self._harm = Harm(history, rules, settings)
        self._remedies = {rule.code: rule.remedy for rule in rules}
        self._treatment = treatment
        self._aftermath = Aftermath(history, broken, self._signs_of_silence)
        self._gravity = Gravity(history)
        self._suspects = Suspects(history, settings)
        self._causes = Causes(history, self._harm, self._suspects, broken)
        self._evidence = Evidence(history)
        self._counting = Counting(self._evidence)
        self._stories: dict[str, Story] = {}
        self.recurring = Recurring()
        self._told = 0
        self._lost = False  # whether the last row was not finite, as an alarm says
        self._harmful: set[int] = set()  # numbers of explosions that undid what was learned, and changed no step
        self._exploded = -math.inf  # step at which the last explosion that was more than a notice has ended
        self.all: list[Incident] = []

    def grow(self) -> None:
        """Extend the state to the layers of the history, to which columns were added."""
        self._suspects.grow()

    @property
    def open(self) -> list[Incident]:
        """The open incidents."""
        return [story.incident for story in self._stories.values() if story.incident is not None]

    @property
    def explosions(self) -> list[tuple[int, int]]:
        """The first and the last step of each explosion that is more than a notice; the last is endless while it is open."""
        return [_steps_of(one) for one in self.all if _is_grave_explosion(one)]

    @property
    def destructive(self) -> list[tuple[int, int]]:
        """Those explosions whose gradients are never usual, however often they come.

        Those whose update would have taken far more from the loss than it holds; all, once one that was not clipped has undone a
        part of what was learned. Others may carry a rare signal that is worth learning.
        """
        harmful = not self._harmful.isdisjoint(one.number for one in self.all)
        return [
            _steps_of(one)
            for one in self.all
            if _is_grave_explosion(one) and (harmful or self._harm.has("overshoot", one.signs))
        ]

    @property
    def damaged(self) -> list[Incident]:
        """The closed incidents whose damage is still there."""
        return [incident for incident in self.all if incident.verdict == "damaged"] if self._aftermath else []

    def open_explosion(self) -> Incident | None:
        """Return the open incident of the explosion story, or None."""
        story = self._stories.get("explosion")
        return story.incident if story else None

    def treatable_explosion(self, *, batches: bool = False) -> Incident | None:
        """Return the open explosion, or None if there is none or, unless ``batches``, if the data or the task caused it.

        No clip lowers a loss that an update has not raised.
        """
        story = self._stories.get("explosion")
        if story is None or (not story.harmed and (story.stays_up or (story.of_the_batch and not batches))):
            return None
        return story.incident

    @property
    def exploding(self) -> bool:
        """True while an incident of the explosion story is open."""
        return self.open_explosion() is not None

    def update(self, changes: Iterable[Alarm], step: int) -> list[Incident]:
        """Update the incidents with the alarms that changed state at ``step``.

        Returns:
            The incidents that opened or closed, or whose kind, severity or verdict changed.
        """
        self._suspects.follow(step)
        touched = set()
        for alarm in changes:
            name: str = "explosion" if alarm.kind in EXPLOSION else alarm.kind
            story = self._stories.setdefault(name, Story())
            key = (alarm.code, alarm.layer)
            if alarm.state == "firing":
                story.firing[key] = alarm
                story.signs.setdefault(key, alarm)
            else:
                story.firing.pop(key, None)
            touched.add(name)
        lost = self._is_nonfinite() and phase_of(self._history) is not None
        if lost and not self._lost:
            self._counting.not_finite(step)
            touched.add("explosion")
        self._lost = lost
        news = self._end_by_another_cause(step)
        for name in list(self._stories):
            new = self._judge(name, self._stories[name], step, touched=name in touched)
            if new is not None:
                news.append(new)
            story = self._stories[name]
            if story.incident is not None and story.before is not None and self._aftermath is not None:
                self._replace(story, self._aftermath.look_meanwhile(story.incident, story.before))
        return news + self._look_again() if self._aftermath else news

    def _is_nonfinite(self) -> bool:
        """Return whether a sign of NaN or infinity fires."""
        story = self._stories.get("explosion")
        return story is not None and any(sign.kind == "nonfinite" for sign in story.firing.values())

    def _end_by_another_cause(self, step: int) -> list[Incident]:
        """Close the open explosion if a sign of another cause begins to fire after it is over; return it.

        A step that was not finite and a surge of finite numbers have different causes, and so different advice. So have a jump
        of the loss and NaN that came with a batch, or when the loss was halfway down, also where the jump is not over.
        """
        story = self._stories.get("explosion")
        if story is None or story.incident is None or story.before is None:
            return []
        told = {key: sign for key, sign in story.firing.items() if sign.code in self._opening}
        nonfinite = {key: sign for key, sign in told.items() if sign.kind == "nonfinite"}
        if not told or bool(nonfinite) is (story.incident.kind == "nonfinite"):
            return []
        before = self._history.loss(last=2)[0]
        given = self._causes.origin is not None and self._causes.origin.came_with_the_batch
        untreated = story.incident.kind == "spike" or (
            story.incident.kind == "exploding" and story.incident.clip is None
        )
        batch = bool(nonfinite) and untreated and (given or before < story.peak / 2)
        if not batch:
            over = step - story.last_fired >= self._settings.apart_steps and len(nonfinite) in (0, len(told))
            if not over or damage_since(self._history, story.before, ""):
                return []
        closed = self._close("explosion", story, step)
        new = self._stories["explosion"]
        new.signs = nonfinite if batch else dict(new.firing)
        return [closed]

    def _signs_of_silence(self) -> dict[tuple[str, str | None], Alarm]:
        """Return the signs of the silent kinds that fire, by code and layer, which may be consequences of an explosion."""
        stories = (story for name, story in self._stories.items() if name != "explosion")
        return {key: sign for story in stories for key, sign in story.firing.items() if key[0] in self._opening}

    def _look_again(self) -> list[Incident]:
        """Follow what closed incidents have left, and return those whose verdict or severity changed."""
        news = []
        for place, incident in enumerate(self.all):
            if incident.number in self._aftermath:
                self.all[place] = self._aftermath.look_again(incident)
                if (self.all[place].verdict, self.all[place].severity) != (incident.verdict, incident.severity):
                    news.append(self.all[place])
        return news

    def record_clip(self, record: ClipRecord) -> None:
        """Attach ``record``, which says what auto-clip did, to the open explosion."""
        story = self._stories.get("explosion")
        if story is not None and story.incident is not None:
            self._replace(story, replace(story.incident, clip=record))

    def record_origin(self, origin: Origin) -> None:
        """Attach ``origin``, which has made a step non-finite, to the explosion that is open, or to the next one that opens."""
        self._causes.origin = origin

    def record_unknown(self, reason: str) -> None:
        """Record why the origin of the explosion that is open, or of the next one that opens, is not known."""
        self._causes.unknown = reason

    def _judge(self, name: str, story: Story, step: int, *, touched: bool) -> Incident | None:
        active = any(code in self._opening for code, _ in story.firing)
        # the origin may be found in a later step of the incident
        touched = touched or (name == "explosion" and self._causes.origin is not None)
        aftermath = name != "explosion" and self.open_explosion() is not None  # a consequence of the explosion
        aftermath |= name == "stalled" and any(has_raised_loss(one) for one in self.damaged)
        if story.incident is None and (aftermath or not active):
            story.signs, story.fired_steps = dict(story.firing), 0
            return None
        if active:
            story.last_fired = step
            story.fired_steps += 1
            due = story.incident is None and self.recurring.is_due(step)
            if name == "explosion" and not story.harmed and self._harm.look_for(story, due=due):
                story.harmed = touched = True
            if story.incident is None:
                if name == "explosion" and not self._opens(story):
                    return None
                touched = True
                self._begin(name, story, step)
        # what no update has raised is another task, unless the loss stays up (GW105)
        may_last = not story.lasting and (story.harmed or not story.of_the_batch) and not story.recurrence.routine
        if may_last and self._history.task_rows < self._history.rows and story.incident is not None:
            # a jump in the row before a new task comes with it, and need not go back to the level of the task before
            may_last = story.incident.opened_step != self._history.last_step_before_task
        if story.incident is not None and may_last and step - story.incident.opened_step >= story.look_at:
            story.lasting = self._harm.level_lasts(story)
            story.look_at *= 2
            touched |= story.lasting
        if not active and self._try_to_end(name, step, calm=step - story.last_fired):
            return self._close(name, story, step)
        touched |= story.incident is not None and not story.weighed and self._history.row.weight_norm is not None
        if story.incident is not None and story.incident.severity == "notice":
            self._gravity.follow(story, step)
            touched |= self._gravity.has_grown(name, story, step)
        if not touched:
            return None
        return self._tell(story, step)

    def _opens(self, story: Story) -> bool:
        """Return whether the signs of an explosion open an incident: the run suffers, or the loss jumps or stays up."""
        if self._take_as_left(story):
            return False
        signs = story.firing.values()
        story.stays_up = self._harm.has("level", signs)
        # growth while the loss is fine is kept as a sign, but opens no incident
        return story.harmed or story.stays_up or any(sign.kind == "spike" for sign in signs)

    def _begin(self, name: str, story: Story, step: int) -> None:
        """Record what is known of the loss in the step in which an incident opens."""
        history = self._history
        story.ceiling, story.peak = history.loss_ceiling(last=1), history.row.loss
        story.jumped = self._harm.has("jump", story.firing.values())
        story.look_at = self._settings.lasting_steps
        story.of_the_batch = step in story.odd_steps
        odd = story.of_the_batch or (story.jumped and is_of_the_batch(history))
        story.odd_batch = odd and not story.stays_up and not moved_by_another(history)
        if story.of_the_batch and name == "explosion":
            one_batch = was_one_batch(history, self.recurring.step)
            story.recurrence = self.recurring.jumped(step, history.row.loss, one_batch=one_batch)
            story.lasting = story.recurrence.grows
        elif name == "explosion" and self._returns(story, step):
            story.harmed = story.lasting = True  # the task has not changed

    def _returns(self, story: Story, step: int) -> bool:
        """Return whether an explosion returns after a short time, which it does not while it only swings at the edge."""
        soon = step - self._exploded <= self._settings.returning_steps
        return soon and not self._harm.at_the_edge(story.firing.values())

    def _take_as_left(self, story: Story) -> bool:
        """Take it for what an earlier explosion has left if nothing fires but that the loss stays up; return whether it is."""
        opening = [sign for sign in story.firing.values() if sign.code in self._opening]
        earlier = [one.number for one in self.damaged if one.kind in EXPLOSION]
        told = bool(earlier) and all(self._harm.has("level", [sign]) for sign in opening)
        self._aftermath.stay_up(earlier if told else ())
        return told

    def _try_to_end(self, name: str, step: int, calm: int) -> bool:
        if self._treatment is None or name != "explosion":
            return calm >= self._settings.calm_steps
        return self._treatment.try_to_let_go(step, calm)

    def _tell(self, story: Story, step: int) -> Incident | None:
        """Open the incident or update it with its signs; return it if it is new or its kind, severity or verdict changed."""
        before, signs = story.incident, tuple(story.signs.values())
        kind = self._kind(story, signs)
        moved = self._causes.take(story, kind)
        after = self._described(story, signs, kind, moved, step)
        if before is None:
            opening = opening_of(self._history, after.suspect, min(sign.step for sign in signs))
            earlier = (one for one in self.all if one.opened_step < EARLY)
            story.opening = replace(opening, shaken=any(_is_grave_explosion(one) for one in earlier))
        after = self._gravity.raised(after, story.opening)
        told = advise(
            after,
            self._history,
            self._remedies,
            story.opening,
            harmless=story.harmless,
            of_the_batch=story.odd_batch,
            moved=story.moved,
            beside=[one for one in (*self.damaged, *self.open) if one.number != after.number],
        )
        after = replace(after, advice=told)
        if before is None:
            self._add(story, after)
            return after
        self._replace(story, after)
        explained = (before.origin is None and after.origin is not None) or bool(moved)
        same = (before.kind, before.severity, before.verdict) == (after.kind, after.severity, after.verdict)
        return None if same and not explained else after

    def _kind(self, story: Story, signs: Sequence[Alarm]) -> Kind:
        kind = kind_of([s for s in signs if story.harmed or s.sign != "growth"], lasting=story.lasting)
        was_spike = story.incident is not None and story.incident.kind == "spike"
        return "spike" if kind in ("exploding", "diverging") and was_spike and self._harm.falls(story) else kind

    def _described(self, story: Story, signs: tuple[Alarm, ...], kind: Kind, moved: str | None, step: int) -> Incident:
        """Return the incident of the story as its signs have it at ``step``, without advice."""
        before = story.incident
        story.harmless = self._is_harmless(story, signs)
        severity, verdict = self._gravity.of(story, signs, kind, step)
        if before is not None:
            severity = max(severity, before.severity, key=SEVERITIES.index)
        confirmed = before.confirmed_step if before is not None else None
        if confirmed is None and verdict == "confirmed":
            confirmed = step
        layers = self._suspects.layers(signs)
        phase = before.phase if before is not None and before.phase else phase_of(self._history)
        suspect = self._suspects.prime(signs, layers, kind, phase, moved)
        if before is not None and before.suspect and not moved and (before.kind == kind or phase is None):
            suspect = before.suspect
        after = replace(
            before or Incident(kind, severity, verdict, opened_step=step, number=self._told),
            kind=kind,
            severity=severity,
            verdict=verdict,
            confirmed_step=confirmed,
            suspect=suspect,
            layers=layers,
            signs=signs,
            evidence=self._evidence.lines(signs, story, suspect),
            ranks=story.ranks,
            phase=phase,
            origin=story.origin,
            times=story.recurrence.times,
            period=story.recurrence.period,
            since=None,
        )
        return self._counting.counted(after, story)

    def _add(self, story: Story, incident: Incident) -> None:
        """Add an incident that opens."""
        opening = [
            int(sign.numbers.get("high since", sign.step)) for sign in incident.signs if sign.code in self._opening
        ]
        first = min(opening or [incident.opened_step])  # not of a sign that has fired since the run began
        story.before = self._aftermath.of_series(self._told, story, self._aftermath.run_before(first, self.damaged))
        self._make_room()
        self._told += 1
        story.place = len(self.all)
        self.all.append(incident)
        self._replace(story, incident)

    def _is_harmless(self, story: Story, signs: Sequence[Alarm]) -> bool:
        """Return whether each non-finite loss so far came with gradients that are all zero, and nothing else fired."""
        if any(sign.sign != "subtle" or sign.kind != "nonfinite" for sign in signs):
            return False
        first = story.incident is None or story.harmless
        return first and (self._history.row.global_norm == 0 or not self._history.loss_nonfinite)

    def _replace(self, story: Story, incident: Incident) -> None:
        story.incident = incident
        self.all[story.place] = incident

    def _make_room(self) -> None:
        """Forget the oldest closed incident if there are too many, so that long runs do not fill the memory."""
        if len(self.all) < _KEPT:
            return
        closed = [index for index, incident in enumerate(self.all) if not incident.open]
        oldest = next((index for index in closed if self.all[index].number not in self._aftermath), closed[0])
        del self.all[oldest]
        for story in self._stories.values():
            story.place -= story.place > oldest

    def _close(self, name: str, story: Story, step: int) -> Incident:
        assert story.incident is not None
        kind = story.incident.kind
        if (
            kind == "exploding"
            and story.fired_steps <= self._settings.brief_steps
            and "confirming" not in {s.sign for s in story.incident.signs}
        ):
            kind = "spike"
        clip = self._treatment.let_go(step) if self._treatment is not None and name == "explosion" else None
        assert story.before is not None
        incident = replace(story.incident, kind=kind, clip=clip or story.incident.clip)
        closed = self._aftermath.close(incident, story.before, step)
        self._replace(story, closed)
        changed = closed.clip is not None and closed.clip.clipped + closed.clip.skipped > 0
        if not changed and closed.severity != "notice" and is_undone(self._history, story.before):
            self._harmful.add(closed.number)
        if kind == "exploding" and closed.severity != "notice":
            self._exploded = step
        self._stories[name] = Story(firing=story.firing)
        return closed


def _is_grave_explosion(incident: Incident) -> bool:
    return incident.kind in EXPLOSION and incident.severity != "notice"


def _steps_of(incident: Incident) -> tuple[int, int]:
    """Return the first and the last step of an incident; the last is endless while it is open."""
    return incident.opened_step, _ENDLESS if incident.closed_step is None else incident.closed_step
