"""The place of an incident among those of its kind in the run: "the 3rd time since step 200, about every 200 steps"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.records import EXPLOSION
from gradwatch.verdict.recurring import Times

if TYPE_CHECKING:
    from gradwatch.records import Incident
    from gradwatch.verdict.evidence import Evidence
    from gradwatch.verdict.story import Story


class Counting:
    """Counts the explosions of a run, the notices on odd batches, and the times that steps were not finite.

    Args:
        evidence: says what the times are that came while an incident was open.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._nonfinite, self._explosions, self._batches = Times(), Times(), Times()

    def not_finite(self, step: int) -> None:
        """Record that a step was not finite, after one that was."""
        self._nonfinite.came(step)

    def counted(self, incident: Incident, story: Story) -> Incident:
        """Return the incident of the story, which has new signs, with its place."""
        if incident.kind == "nonfinite":
            return self._among_nonfinite(incident, story.incident)
        if incident.in_series:  # the program's own, which has a count of its own
            pass
        elif incident.kind in EXPLOSION and incident.severity != "notice":
            story.returns = story.returns or self._explosions.came(incident.opened_step)
        elif incident.kind == "spike" and story.odd_batch:
            story.batch_returns = story.batch_returns or self._batches.came(incident.opened_step)
        returns = story.returns or story.batch_returns
        if returns is None:
            return incident
        return replace(incident, times=returns.times, since=returns.since, period=returns.period)

    def _among_nonfinite(self, after: Incident, before: Incident | None) -> Incident:
        last = self._nonfinite.last
        if before is None or before.kind != "nonfinite":
            return replace(after, times=last.times, since=last.since, period=last.period)
        evidence = (*after.evidence, *self._evidence.returned(before, last))
        return replace(after, times=before.times, since=before.since, period=before.period, evidence=evidence)
