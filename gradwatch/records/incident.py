"""`Incident`: a disturbance of the run, formed from alarms that belong together."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch.records.alarm import Alarm  # noqa: TC001  pydantic reads the annotations
from gradwatch.records.clip_record import ClipRecord  # noqa: TC001
from gradwatch.records.kinds import EXPLOSION, Kind, Phase, Severity, Verdict
from gradwatch.records.origin import Origin  # noqa: TC001
from gradwatch.text.printable import printable
from gradwatch.text.wording import about_every, ordinal


@dataclass(frozen=True, slots=True, repr=False)
class Incident:
    """A disturbance of the run, formed from the alarms that belong together. Steps count optimizer steps from 0.

    An incident is replaced and never changed, so an incident that a report holds stays as it was.

    Attributes:
        kind: kind of the disturbance.
        severity: ``"notice"``, ``"warning"`` or ``"critical"``.
        verdict: ``"suspected"`` or ``"confirmed"`` while it is open; then ``"resolved"``, or ``"damaged"`` while something is
            worse than before the fault.
        opened_step: step at which it was opened.
        confirmed_step: step at which it was confirmed; None: it was not.
        closed_step: step at which it was closed; None: it is open.
        suspect: name of the prime suspect among the layers; None if there is none.
        layers: affected layers, in the order in which they left their band.
        signs: alarms that belong to it.
        evidence: what was observed, in sentences.
        advice: what to do, in sentences.
        phase: where non-finite values were seen first; None if there were none.
        clip: what auto-clip did about it; None: nothing.
        ranks: processes from which non-finite values originate, if that is known.
        origin: the operation that made the first non-finite number; None if it is not known.
        number: index of the incident in the run, from 0.
        left: what is worse than before the fault although the incident is closed, or while it is ``undone``, in sentences.
        times: its number in a series of jumps that come back with a period, among the explosions of the run, among its odd
            batches, or among all times that its steps were not finite; 1: it is the first, or there is no series.
        period: number of steps from one of them to the next; None: they come without a period.
        undone: whether it is a notice, and the loss has lost half of what it had fallen before it.
        since: step of the first explosion, odd batch, or step that was not finite; None: it is of another kind.
    """

    kind: Kind
    severity: Severity
    verdict: Verdict
    opened_step: int
    confirmed_step: int | None = None
    closed_step: int | None = None
    suspect: str | None = None
    layers: tuple[str, ...] = ()
    signs: tuple[Alarm, ...] = ()
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    phase: Phase | None = None
    clip: ClipRecord | None = None
    ranks: tuple[int, ...] = ()
    number: int = 0
    left: tuple[str, ...] = ()
    origin: Origin | None = None
    times: int = 1
    period: int | None = None
    since: int | None = None
    undone: bool = False

    @property
    def open(self) -> bool:
        """True until the incident is closed."""
        return self.closed_step is None

    @property
    def speaks_against_run(self) -> bool:
        """True while it is open or damaged; for a notice, while it has undone most of what was learned."""
        return self.undone if self.severity == "notice" else self.open or self.verdict == "damaged"

    @property
    def told_in_full(self) -> bool:
        """True if reports tell it with evidence and advice: it is more than a notice, or has undone what was learned."""
        return self.severity != "notice" or self.undone

    @property
    def in_series(self) -> bool:
        """True if it is one of a series of jumps that no update has caused."""
        return self.period is not None and self.since is None

    @property
    def of_its_layers(self) -> str:
        """What the order of the layers is, in words that a list of names follows."""
        return "left their band in this order" if self.kind in EXPLOSION else "found in these layers"

    @property
    def told(self) -> tuple[str, ...]:
        """What is known of the origin, which each process knows of its own, and the evidence."""
        return (*(self.origin.details if self.origin is not None else ()), *self.evidence)

    def __repr__(self) -> str:
        return f"<Incident {self}>"

    @property
    def headline(self) -> str:
        """Kind, verdict, severity, steps and suspect, without the origin."""
        steps = f"step {self.opened_step}" + (f" to {self.closed_step}" if self.closed_step is not None else "")
        suspect = f", prime suspect {self.suspect}" if self.suspect else ""
        word = "over, with damage" if self.verdict == "damaged" else self.verdict
        return printable(f"{self.kind} {word} ({self.severity}), {steps}{self._again}{suspect}")

    @property
    def _again(self) -> str:
        """Which time it is, if it is known to come back."""
        if self.since is None:
            return (
                f", the {ordinal(self.times)} time, about every {self.period} steps" if self.period is not None else ""
            )
        if self.times < 2:
            return ""
        pace = about_every(self.period, self.opened_step - self.since, self.times - 1)
        return f", the {ordinal(self.times)} time since step {self.since}{pace}"

    def __str__(self) -> str:
        origin = f": {self.origin}" if self.origin is not None else ""
        left = f": {'; '.join(self.left)}" if self.left else ""
        return printable(f"{self.headline}{origin}{left}")
