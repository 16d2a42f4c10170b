"""How grave an incident is, also where that changes while its signs do not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.history.gradient_norms import ABSENT
from gradwatch.history.losses import APART
from gradwatch.verdict.silent_advice import learns_nothing
from gradwatch.verdict.story import severity_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Incident, Kind, Severity, Verdict
    from gradwatch.verdict.opening import Opening
    from gradwatch.verdict.story import Story

_LOST = 48  # steps after which losses that are not finite are no notice, although no gradient came with them
_HIGH = 100  # steps for which the loss is high again before a dead part is no notice


class Gravity:
    """Tells how grave the incidents of a run are.

    Args:
        history: the history of the run, which is only read.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def follow(self, story: Story, step: int) -> None:
        """Record since when a run that learned without the dead parts of an open notice does so no longer."""
        assert story.incident is not None
        if story.incident.kind != "dead":
            return
        if self._learns_without(story.incident.signs):
            story.high_since = None
        elif story.high_since is None:
            story.high_since = step

    def of(self, story: Story, signs: Sequence[Alarm], kind: Kind, step: int) -> tuple[Severity, Verdict]:
        """Return how grave and how sure the incident of a story with these signs is at ``step``."""
        severity, verdict = severity_of(signs, kind, harmless=story.harmless and not self._is_lost)
        if kind == "dead" and (self._learns_without(signs) or not self._is_high(story, step)):
            severity = "notice"
        return severity, verdict

    def raised(self, incident: Incident, opening: Opening) -> Incident:
        """Return the incident, as a warning if it is a notice on a loss that stalls because nothing can be learned."""
        stalls = incident.kind == "stalled" and incident.severity == "notice"
        return replace(incident, severity="warning") if stalls and learns_nothing(self._history, opening) else incident

    def has_grown(self, name: str, story: Story, step: int) -> bool:
        """Return whether an open notice, which was followed up to this step, is none any more."""
        return self._is_high(story, step) if name == "dead" else story.harmless and self._is_lost

    def _learns_without(self, dead: Iterable[Alarm]) -> bool:
        """Return whether the run learns without what these signs call dead: some gradient arrives, and the loss is low."""
        left = min((sign.numbers.get("left", 1.0) for sign in dead), default=1.0)
        return self._flows and self._loss_tells and self._history.has_halved(left)

    @property
    def _loss_tells(self) -> bool:
        """Whether the loss tells if the run learns: it is to fall, if only between jumps that the program makes."""
        history = self._history
        return not (history.resting == APART or history.opposed or (history.resting and history.facts.maximizes))

    @property
    def _flows(self) -> bool:
        return bool((self._history.global_norm(last=ABSENT) > 0).any())

    @property
    def _is_lost(self) -> bool:
        """Whether no loss has been finite for many steps."""
        since = self._history.lost_since
        return since is not None and self._history.row.step - since >= _LOST

    def _is_high(self, story: Story, step: int) -> bool:
        """Return whether the loss is high beside dead parts; in an open notice for 100 steps, since a new task may be learned."""
        if story.incident is None or not self._flows or not self._loss_tells:
            return True
        return story.high_since is not None and step - story.high_since >= _HIGH
