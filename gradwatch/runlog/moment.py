"""The latest state of a run, stored so that a live view in another process shows the same as one in the training process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.records import ClipUse, Facts, Provenance, RunVerdict, UsualNorms  # noqa: TC001  pydantic reads them

if TYPE_CHECKING:
    from gradwatch.records import Snapshot


@dataclass(frozen=True)
class Moment:
    """The attributes of a `Snapshot` that are neither arrays nor stored in a table of their own."""

    facts: Facts
    rules: tuple[str, ...]
    firing: tuple[str, ...]
    verdict: RunVerdict
    clipping: str | None
    clip_on: bool
    clipped: int
    skipped: int
    seconds: float
    steps_per_second: float
    cost_us: float
    provenance: Provenance
    ending: str = ""
    usual_norms: UsualNorms | None = None  # not in logs of earlier versions, nor are the next
    clip_use: ClipUse | None = None
    scaled_up: int = 0

    @classmethod
    def of(cls, snapshot: Snapshot) -> Moment:
        """Return the moment of ``snapshot``."""
        return cls(
            facts=snapshot.facts,
            rules=tuple(snapshot.rules),
            firing=snapshot.firing,
            verdict=snapshot.verdict,
            clipping=snapshot.clipping,
            clip_on=snapshot.clip_on,
            clipped=snapshot.clipped,
            skipped=snapshot.skipped,
            seconds=snapshot.seconds,
            steps_per_second=snapshot.steps_per_second,
            cost_us=snapshot.cost_us,
            provenance=snapshot.provenance,
            ending=snapshot.ending,
            usual_norms=snapshot.usual_norms,
            clip_use=snapshot.clip_use,
            scaled_up=snapshot.scaled_up,
        )
