"""The story behind an incident: what has been seen of it so far, and what its signs make of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.records import EXPLOSION, Alarm, Incident, Kind, Origin, Phase, Severity, Verdict
from gradwatch.verdict.opening import Opening
from gradwatch.verdict.recurring import Recurrence, Returns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.verdict.damage import Before


@dataclass
class Story:
    """The working state of an incident that is open or not yet opened."""

    firing: dict[tuple[str, str | None], Alarm] = field(default_factory=dict)
    signs: dict[tuple[str, str | None], Alarm] = field(default_factory=dict)
    incident: Incident | None = None
    place: int = -1
    before: Before | None = None  # known from the opening on
    fired_steps: int = 0
    last_fired: int = -1
    ceiling: float = math.nan
    peak: float = math.nan
    jumped: bool = False
    of_the_batch: bool = False  # opened by a jump that the last update cannot have caused
    odd_batch: bool = False  # opened with such a jump, whether or not an update was too long as well
    stays_up: bool = False  # opened after the loss had been far above its level for long
    look_at: int = 0
    level: float = math.nan
    lasting: bool = False
    harmed: bool = False
    odd_steps: set[int] = field(default_factory=set)
    ranks: tuple[int, ...] = ()
    moved: str | None = None  # the only layer whose weights were changed before it
    findings: list[str] = field(default_factory=list)
    opening: Opening = field(default_factory=lambda: Opening(-1, math.nan))
    named: bool = False  # whether a buffer that is not finite was looked for
    harmless: bool = False  # no gradient but zero came with a loss that is not finite
    high_since: int | None = None  # step since which the loss is high again beside a dead part
    weighed: bool = False  # whether weights were sampled since it opened, so that a layer that changed alone is known
    origin: Origin | None = None
    unknown: str = ""  # why the origin is not known, if that was told
    recurrence: Recurrence = field(default_factory=Recurrence)
    returns: Returns | None = None  # the place among the explosions that are more than a notice, once it is one
    batch_returns: Returns | None = None  # the place among the notices on odd batches


def kind_of(signs: Sequence[Alarm], *, lasting: bool) -> Kind:
    """Return the kind of an incident with these signs; ``lasting``: its loss stays up."""
    if signs[0].kind not in EXPLOSION:
        return signs[0].kind
    growth = min((sign.step for sign in signs if sign.sign == "growth"), default=math.inf)
    nonfinite = min((sign.step for sign in signs if sign.kind == "nonfinite"), default=math.inf)
    if nonfinite <= growth and nonfinite < math.inf:  # what came first decides
        return "nonfinite"
    if growth < math.inf:
        return "exploding"
    return "diverging" if lasting or any(sign.kind == "diverging" for sign in signs) else "spike"


def severity_of(signs: Sequence[Alarm], kind: Kind, *, harmless: bool) -> tuple[Severity, Verdict]:
    """Return how grave and how sure an incident with these signs is; ``harmless``: no gradient but zero was seen with NaN."""
    found = {sign.sign for sign in signs}
    confirmed = "confirming" in found and bool(found & {"subtle", "growth", "numeric"})
    verdict: Verdict = "confirmed" if confirmed else "suspected"
    if any(sign.kind == "nonfinite" for sign in signs):
        return ("notice", "suspected") if harmless else ("critical", verdict)
    if kind == "spike" or (kind == "stalled" and "silent" not in found):
        return "notice", "suspected"
    return ("critical" if confirmed else "warning"), verdict


def phase_of(history: History) -> Phase | None:
    """Return where non-finite values are seen: weight before loss before gradient, in the order of the data flow."""
    if history.nonfinite_weight.any():
        return "weight"
    if history.loss_nonfinite:
        return "loss"
    if (history.nonfinite > 0).any():
        return "gradient"
    return None
