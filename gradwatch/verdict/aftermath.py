"""What closed incidents have left: an incident is resolved only when nothing is worse than before its fault."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.history.recurrence import was_one_batch
from gradwatch.records import EXPLOSION
from gradwatch.verdict.advice import what_changed
from gradwatch.verdict.damage import (
    Before,
    before_fault,
    damage_since,
    is_mostly_undone,
    is_undone,
    level_now,
    recovered_after,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, ClipRecord, Incident
    from gradwatch.verdict.story import Story

_WELL = 32  # steps without damage after which it is over: one level of the loss may be a dip
_FAR = 10.0  # multiple of its level before beyond which a loss is no rare batch's, as in GW105
_ROUND = 3  # times that odd batches came from which on they are not over while what was learned is undone
_LASTING = 100  # steps after which what a notice has left makes it a warning


def has_raised_loss(incident: Incident) -> bool:
    """Return whether an explosion that was more than a notice is over, and the loss is still high."""
    return incident.kind in EXPLOSION and incident.severity != "notice" and _names_loss(incident)


def _names_loss(incident: Incident) -> bool:
    return any(" the loss is " in line for line in incident.left)


def _is_minor_explosion(incident: Incident) -> bool:
    return incident.kind in EXPLOSION and incident.severity == "notice"


class Aftermath:
    """The closed incidents whose damage is still there, or may yet be seen.

    Args:
        history: the history of the run, which is only read.
        broken: returns which weights and buffers are not finite, in words; empty if all are, as far as it is known.
        signs: returns the signs of silent kinds that fire, by code and layer.
    """

    def __init__(
        self,
        history: History,
        broken: Callable[[], str],
        signs: Callable[[], Mapping[tuple[str, str | None], Alarm]] = dict,
    ) -> None:
        self._history = history
        self._broken = broken
        self._signs = signs
        self._followed_by: dict[int, set[tuple[str, str | None]]] = {}  # signs that began in it and fired at its end
        self._before: dict[int, Before] = {}  # by the number of the incident
        self._series: list[tuple[int, Before]] = []  # numbers of the last jumps, and the runs before them
        self._well_since: dict[int, int] = {}  # step since which nothing is left, by the number of the incident
        self._high: set[int] = set()  # numbers of those after which the loss stays up
        self._single: set[int] = set()  # numbers of those on a single batch, which is no new data
        self._excused: list[tuple[int, Before]] = []  # those whose damage was taken for a routine of the program

    def __len__(self) -> int:
        """The number of incidents that are followed."""
        return len(self._before)

    def __contains__(self, number: int) -> bool:
        """Return whether the incident with this number is followed."""
        return number in self._before

    def run_before(self, step: int, damaged: Iterable[Incident]) -> Before:
        """Return the run before the first sign at ``step``, or before one of the ``damaged`` incidents if it was better then."""
        before = before_fault(self._history, step)
        since = self._history.buffers_bad_since
        if since is not None and since < step:  # of another fault
            before = replace(before, broken=self._broken())
        for incident in damaged:
            earlier = self._before[incident.number]
            counts = earlier.settled or incident.severity != "notice"
            if counts and earlier.task == before.task and earlier.whose == before.whose and earlier.loss < before.loss:
                before = earlier
        return before

    def of_series(self, number: int, story: Story, before: Before) -> Before:
        """Return the run before incident ``number``, given the one before its first sign, if the incident is one of a series.

        In a routine of the program, no level of the loss is known to which the loss should come back.
        """
        if story.recurrence.period is None:
            self._series = [(number, replace(before, ceiling=max(before.ceiling, story.peak)))]
            self._excused = []
            return before
        if story.recurrence.grows:
            self._before.update(self._excused)  # it is none
            self._excused = []
            return self._series[0][1]
        for one, earlier in self._series:
            if one in self._before and not math.isnan(self._before[one].loss):
                self._excused.append((one, self._before[one]))
                self._before[one] = replace(earlier, loss=math.nan, ceiling=math.nan)
        self._series.append((number, before))
        return replace(before, loss=math.nan, ceiling=math.nan)

    def stay_up(self, numbers: Iterable[int]) -> None:
        """Record that the loss stays up, by a rule of its own, after the incidents with these numbers."""
        self._high.update(numbers)

    def close(self, incident: Incident, before: Before, step: int) -> Incident:
        """Return the incident as it closes at ``step``, with what it has left, and follow that from now on."""
        if before.young and incident.severity == "notice":  # no update has raised the loss, and only one loss is known
            before = replace(before, ceiling=before.loss + abs(before.loss), young=False)
        elif (
            before.young and incident.kind == "nonfinite"
        ):  # nothing has exploded, so nothing need be learned to be back
            before = replace(before, ceiling=before.loss + abs(before.loss) / 10)
        fired = {key for key, sign in self._signs().items() if sign.step > incident.opened_step}
        if fired and incident.kind in ("exploding", "diverging") and incident.severity != "notice":
            self._followed_by[incident.number] = fired
        left = damage_since(self._history, before, self._broken(), self._silent) or self._consequences(incident)
        if left or before.young:
            self._before[incident.number] = before
            if incident.kind in EXPLOSION and was_one_batch(self._history, incident.opened_step):
                self._single.add(incident.number)
        clip = incident.clip and self._judge(incident.clip, before, left)
        incident = replace(incident, verdict="damaged" if left else "resolved", closed_step=step, clip=clip, left=left)
        return self._with_undone(incident, before)

    def look_again(self, incident: Incident) -> Incident:
        """Return the closed incident with what it has left now.

        The damage may be over. Whether the run has learned since one of its first steps is known only later.
        """
        before = self._before.get(incident.number)
        if before is None:
            return incident
        # the model is read only where everything else is well
        left = (
            damage_since(self._history, before, "", self._silent)
            or self._consequences(incident)
            or damage_since(self._history, before, self._broken())
        )
        if left:
            self._well_since.pop(incident.number, None)
        elif _names_loss(incident):
            since = self._well_since.setdefault(incident.number, self._history.row.step)
            left = incident.left if self._history.row.step - since < _WELL else ()
        clip = incident.clip
        if left and clip is not None and clip.helped:
            clip = replace(clip, helped=False, damage="; ".join(left))
        if clip is not None and clip.damage and bool(left) is not (clip.mended_step is None):
            clip = replace(clip, mended_step=None if left else self._history.row.step)
        if not left and not before.young:
            del self._before[incident.number]
            self._followed_by.pop(incident.number, None)
        notice = incident.severity == "notice"
        severity = "warning" if notice and left and self._lasts(incident, before) else incident.severity
        if severity != incident.severity and incident.number in self._high - self._single:
            incident = replace(incident, advice=(what_changed(incident.opened_step),))
        incident = replace(incident, severity=severity, verdict="damaged" if left else "resolved", left=left, clip=clip)
        return self._with_undone(incident, before)

    def look_meanwhile(self, incident: Incident, before: Before) -> Incident:
        """Return the open incident with what it has left so far, if it is a notice that has undone what was learned."""
        if incident.severity != "notice" and not incident.left:
            return incident
        undone = _is_minor_explosion(incident) and is_mostly_undone(self._history, before)
        left = damage_since(self._history, before, "") if undone else ()
        return replace(incident, left=left, undone=bool(left))

    def _with_undone(self, incident: Incident, before: Before) -> Incident:
        undone = _is_minor_explosion(incident) and bool(incident.left) and is_mostly_undone(self._history, before)
        return incident if undone is incident.undone else replace(incident, undone=undone)

    @property
    def _silent(self) -> frozenset[str]:
        """The layers without any gradient, by the rule for dead ones, which takes more than one step to fall silent."""
        dead = (sign for sign in self._signs().values() if sign.kind == "dead")
        return frozenset(sign.layer for sign in dead if sign.layer and sign.numbers.get("layer"))

    def _consequences(self, incident: Incident) -> tuple[str, ...]:
        """Return the first sign in words that began to fire in an incident, and has fired ever since."""
        keys, firing = self._followed_by.get(incident.number, set()), self._signs()
        signs = [firing[key] for key in keys & firing.keys()]
        if not signs:
            return ()
        first = min(signs, key=lambda sign: sign.step)
        return (first.words or f"{first.name} ({first.code}) since step {first.step}",)

    def _lasts(self, incident: Incident, before: Before) -> bool:
        """Return whether the loss stays up, or a single batch has undone for long what was learned."""
        if incident.number in self._high:
            return True
        if incident.number not in self._single or not before.settled or not is_undone(self._history, before):
            return False
        long = incident.closed_step is not None and self._history.row.step - incident.closed_step >= _LASTING
        far = level_now(self._history, before) > _FAR * abs(before.loss)
        return long and (far or (incident.since is not None and incident.times >= _ROUND))

    def _judge(self, clip: ClipRecord, before: Before, left: tuple[str, ...]) -> ClipRecord:
        """Return the record with what became of the loss. If no loss was seen or no step was changed, nothing is said to help."""
        if clip.unlearned is not None:
            return clip
        level = level_now(self._history, before)
        known = not math.isnan(before.loss) and not math.isnan(level) and clip.clipped + clip.skipped > 0
        known = known and clip.lifted_step is None
        helped = not left if known else None
        since = recovered_after(self._history, before, clip.from_step, clip.released_step) if helped else None
        damage = "; ".join(left)
        return replace(
            clip, loss_before=before.loss, loss_after=level, helped=helped, recovered_after=since, damage=damage
        )
