"""The records of the library: Row, Alarm, Incident, ClipRecord, Facts, Snapshot.

They are plain frozen data. This module does not import torch, so records can be kept, sent and shown anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gradwatch.origin import Origin  # noqa: TC001  pydantic reads the annotations
from gradwatch.printable import printable
from gradwatch.wording import apart, counted, number, ordinal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from gradwatch.answers import ClipUse, UsualNorms

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

Sign = Literal["subtle", "confirming", "growth", "numeric", "silent", "clip"]
Role = Literal["", "surge", "jump", "update", "overshoot", "damage", "backward"]
Kind = Literal["exploding", "spike", "nonfinite", "diverging", "vanishing", "stalled", "dead", "frozen", "clipping"]
Severity = Literal["notice", "warning", "critical"]
Verdict = Literal["suspected", "confirmed", "damaged", "resolved"]
RunVerdict = Literal["healthy", "suspected", "confirmed", "damaged"]
Phase = Literal["loss", "gradient", "weight"]
Source = Literal[
    "optimizer step",
    "closure",
    "end of backward",
    "monitor.step()",
    "optimizer in backward",
    "left out by the scaler",
    "written",
]
Family = Literal["sgd", "adam", "other"]
CulpritSign = Literal["loss", "backward", "gradient"]
LossSource = Literal["monitor.loss()", "closure", "backward root", "written", "none"]
Clipped = Literal["no clip before it seen", "before the user's clip", "as the optimizer sees it"]

SEVERITIES: tuple[Severity, ...] = ("notice", "warning", "critical")
VERDICTS: dict[RunVerdict, str] = {
    "healthy": "nothing that is known speaks against the run now; incidents of before, if any, are resolved",
    "suspected": "an incident is open that is more than a notice",
    "confirmed": "such an incident is open, and a confirming sign occurred together with another one",
    "damaged": "no such incident is open, but one has left something worse than before: the loss, a dead layer, a value that is "
    "not finite",
}
EXPLOSION: tuple[Kind, ...] = ("exploding", "spike", "nonfinite", "diverging")  # stages of one incident


class NonFinite(IntFlag):
    """The kinds of non-finite values in a gradient."""

    NONE = 0
    NAN = 1
    INF = 2


class Provenance(NamedTuple):
    """The origin of the values of a row.

    Attributes:
        source: moment of the measurement.
        clipped: whether norms are from before or after the user's own clip, as far as that is known.
        loss: source of the loss.
        processes: number of processes whose values are combined, with the mean of their losses; 1: only this process.
    """

    source: Source = "optimizer step"
    clipped: Clipped = "as the optimizer sees it"
    loss: LossSource = "none"
    processes: int = 1

    def __str__(self) -> str:
        of = f", of all {self.processes} processes" if self.processes > 1 else ""
        return f"measured at {self.source}, {self.clipped}{of}; loss from {self.loss}"


class Culprits(NamedTuple):
    """The processes from which a non-finite step originates, because only their own values were not finite.

    Attributes:
        ranks: the processes.
        sign: whether it was their loss, their backward or their gradients.
    """

    ranks: tuple[int, ...]
    sign: CulpritSign

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else "ranks " + ", ".join(map(str, self.ranks))
        what = {
            "loss": "the loss was not finite",
            "backward": "backward gave gradients that are not finite",
            "gradient": "there are gradients that are not finite",
        }
        return f"on {who} alone {what[self.sign]}"


class Row(NamedTuple):
    """The values of one optimizer step, for ``L`` layers. Missing values are NaN, or None for whole arrays.

    Attributes:
        step: number of the step, from 0.
        loss: loss of the step; NaN if no loss was seen (see `has_loss`).
        grad_norm: gradient norms before any clip that gradwatch saw or made, shape (L,).
        global_norm: L2 norm of all gradients as one vector.
        weight_norm: weight norms before the update, shape (L,); None if they were not sampled.
        nonfinite: `NonFinite` flags of the gradients, shape (L,); None if all are finite.
        nonfinite_weight: whether weights are not finite, shape (L,).
        counts: number of (NaN, Inf) gradient elements by column, only for steps with non-finite gradients on the CPU.
        poisoned: whether the gradients that the optimizer is about to use are not finite. ``nonfinite`` may refer to those
            before the user's clip.
        rate: learning rate of each layer's parameter group, shape (L,).
        family: family of the optimizer.
        applied: factor that the user's own clip put on the gradients; 1.0 if no clip was seen.
        dead_share: share of dead units, shape (L,); None if it was not sampled.
        unchanged: number of rows for which the weights have not changed, shape (L,); None if it was not sampled.
        arrived: whether a gradient of the layer was ever seen to arrive, shape (L,).
        culprits: processes from which non-finite values originate; None if there are none or it is not known.
        provenance: origin of the values.
        optimizer: index of the optimizer in the order in which they were found; -1 if no optimizer of torch makes the
            update, or several do inside backward.
        order: rank of each layer in the order in which gradients arrived in backward, shape (L,); None: as in the row before.
    """

    step: int
    loss: float
    grad_norm: Floats
    global_norm: float
    weight_norm: Floats | None = None
    nonfinite: NDArray[np.uint8] | None = None
    nonfinite_weight: NDArray[np.bool_] | None = None
    counts: Mapping[int, tuple[int, int]] | None = None
    poisoned: bool = False
    rate: Floats | None = None
    family: Family = "other"
    applied: float = 1.0
    dead_share: Floats | None = None
    unchanged: Floats | None = None
    arrived: NDArray[np.bool_] | None = None
    culprits: Culprits | None = None
    provenance: Provenance = Provenance()
    optimizer: int = -1
    order: NDArray[np.intp] | None = None

    @property
    def has_loss(self) -> bool:
        """True if a loss was seen; otherwise ``loss`` is NaN, which stands for a missing value."""
        return self.provenance.loss != "none"

    @property
    def loss_nonfinite(self) -> bool:
        """True if a loss was seen and it is NaN or infinite."""
        return self.has_loss and not math.isfinite(self.loss)


@dataclass(frozen=True, slots=True, repr=False)
class Alarm:
    """A change of state of one rule on one layer.

    Attributes:
        code, name, sign, kind: those of the rule.
        layer: name of the layer; None: the whole model.
        step: step of the change.
        value: quantity that the rule computed.
        limit: limit of the rule.
        state: whether the rule began or ceased to fire.
        words: what the rule saw, as a sentence of its own; ``""``: it has none, or it is not known (see `sentence`).
        numbers: the measured numbers that stand in ``words``, by name.
    """

    code: str
    name: str
    sign: Sign
    kind: Kind
    layer: str | None
    step: int
    value: float
    limit: float
    state: Literal["firing", "resolved"] = "firing"
    words: str = ""
    numbers: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def sentence(self) -> str:
        """What was seen: ``words``, or the name of the rule with value and limit where there are none."""
        if self.words:
            return self.words
        where = f" in {self.layer}" if self.layer else ""
        if self.state == "resolved":
            return f"{self.name}{where}: over at step {self.step}"
        if not self.limit > 0 or not math.isfinite(self.value):  # a yes or no, or a measure beyond every limit
            return f"{self.name}{where} at step {self.step}"
        value, limit = apart(self.value, self.limit)
        return f"{self.name}{where} at step {self.step}: measured {value}, above its limit of {limit}"

    def __repr__(self) -> str:
        return f"<Alarm {self}, {self.state}>"

    def __str__(self) -> str:
        return printable(f"{self.sentence} ({self.code})")


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What auto-clip did about an incident, and whether it helped.

    Attributes:
        clip: the clip, in words.
        from_step: step at which auto-clip was switched on.
        clipped: number of steps that were clipped.
        skipped: number of steps that were left out.
        steps: number of steps while it was on.
        norm_before: largest global norm meanwhile.
        norm_after: what the clip left of ``norm_before``.
        loss_before: level of the loss before the incident.
        loss_after: last loss while auto-clip is on; level of the loss when the incident closes.
        released_step: step at which auto-clip was switched off; None: it is still on.
        helped: whether everything is as well as before the fault, after it had changed steps; None: not known.
        recovered_after: number of steps after which the loss was back at its level for good; None: it was not yet.
        measures: measures beyond clipping, in words.
        unlearned: first and last level of the losses of clipped steps, if clipping kept them high while all other losses
            were well. The clip was then released at once.
        family: family of the optimizer.
        damage: what was worse than before the fault when the incident closed, in words.
    """

    clip: str
    from_step: int
    clipped: int = 0
    skipped: int = 0
    steps: int = 0
    norm_before: float = float("nan")
    norm_after: float = float("nan")
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    released_step: int | None = None
    helped: bool | None = None
    recovered_after: int | None = None
    measures: tuple[str, ...] = ()
    unlearned: tuple[float, float] | None = None
    family: Family = "other"
    damage: str = ""

    @property
    def share(self) -> float:
        """The share of clipped steps since ``from_step``; NaN before the first step."""
        return self.clipped / self.steps if self.steps else math.nan

    def __str__(self) -> str:
        parts = [f"{self.clip} clipped {self.clipped} of {self.steps} steps"]
        if self.skipped:
            parts[0] += f", {self.skipped} skipped"
        if math.isfinite(self.norm_before):
            parts.append(f"largest norm {number(self.norm_before)}{self._of_it}")
        parts += self.measures
        if self.released_step is None:
            return "; ".join([*parts, "still on"])
        if not math.isnan(self.loss_before) and not math.isnan(self.loss_after):
            parts.append(f"loss {number(self.loss_after)}, {number(self.loss_before)} before the fault")
            if self.recovered_after is not None:
                parts[-1] += f", back at its level after {counted(self.recovered_after, 'step')}"
        outcome = self._outcome
        return "; ".join([*parts, f"released at step {self.released_step}" + (f": {outcome}" if outcome else "")])

    @property
    def _of_it(self) -> str:
        """What became of the largest norm, if it was changed."""
        if self.norm_after == 0 and self.skipped:
            return ", of a step that was left out"
        before, after = number(self.norm_before), number(self.norm_after)
        return f", clipped to {after}" if self.norm_after < self.norm_before and before != after else ""

    @property
    def _outcome(self) -> str:
        if self.helped:
            return "it helped"
        if self.unlearned is not None:
            before, after = self.unlearned
            return (
                f"the losses of the steps that it clipped did not come down, from {number(before)} to {number(after)}, while "
                "the others were well: they carry a rare signal. It is not switched on again for gradients up to "
                f"{number(self.norm_before)}"
            )
        if not self.clipped + self.skipped:
            return "it changed no step"
        return f"over, with damage: {self.damage}" if self.damage else ""


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
        left: what is worse than before the fault although the incident is closed, in sentences.
        times: its number in a series of jumps that come back with a period; 1: there is no series.
        period: number of steps from one of them to the next; None: there is no series.
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

    @property
    def open(self) -> bool:
        """True until the incident is closed."""
        return self.closed_step is None

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
        again = f", the {ordinal(self.times)} time, every {self.period} steps" if self.period is not None else ""
        return printable(f"{self.kind} {word} ({self.severity}), {steps}{again}{suspect}")

    def __str__(self) -> str:
        origin = f": {self.origin}" if self.origin is not None else ""
        left = f": {'; '.join(self.left)}" if self.left else ""
        return printable(f"{self.headline}{origin}{left}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the model and its optimizer, for advice and reports.

    Attributes:
        model: class of the model.
        name: name that the user gave to the run; "" if none.
        layers: number of layers.
        parameters: number of parameter elements.
        recurrent, gated, normalised: whether the model has recurrent, gated recurrent, and normalisation layers.
        depth: number of layers with two or more dimensions.
        optimizer: class of the optimizer; None if it is not known yet.
        family: family of the optimizer.
        rate: largest learning rate; NaN if it is not known.
        clip: clip of auto-clip, in words; None if gradwatch only watches.
        clips_always: whether auto-clip acts at each step.
        embeds: whether the model has embeddings, so that inputs may be indices.
        saturates, rectified: whether it has activations that saturate (sigmoid, tanh), and ReLUs.
        loss: kind of the loss, such as ``"cross-entropy"``; "" if it is not known.
        mistakes: mistakes of the program that are certain, in sentences.
    """

    model: str = "model"
    layers: int = 0
    parameters: int = 0
    recurrent: bool = False
    gated: bool = False
    normalised: bool = False
    depth: int = 0
    optimizer: str | None = None
    family: Family = "other"
    rate: float = float("nan")
    clip: str | None = None
    clips_always: bool = False
    embeds: bool = False
    saturates: bool = False
    rectified: bool = False
    loss: str = ""
    mistakes: tuple[str, ...] = ()
    name: str = ""  # last, because logs of earlier versions have none

    @property
    def called(self) -> str:
        """The name that the user gave and the class of the model; only the class if there is no name."""
        return f"{self.name} ({self.model})" if self.name else self.model


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one step, which is all that a report receives. The series hold the last rows, oldest first.

    Attributes:
        facts: what is known of the model and its optimizer.
        step: last step.
        layers: names of the ``L`` layers.
        loss, global_norm: series of losses and global norms.
        grad_norm, nonfinite, weight_norm: last values of each layer, shape (L,).
        closeness: largest value over limit of each layer among all rules, shape (L,).
        closest: index in ``rules`` of the rule to which that value belongs, shape (L,).
        rules: code and name of each rule.
        firing: rules that fire now.
        incidents: incidents so far.
        verdict: state of the run, one of `VERDICTS`.
        clipping: clip of auto-clip, in words; None if gradwatch only watches.
        clip_on: whether auto-clip is on.
        clipped, skipped: number of steps that auto-clip clipped and left out.
        seconds: time since the run began.
        steps_per_second: speed of the training.
        cost_us: time that gradwatch takes per optimizer step, in microseconds.
        provenance: origin of the last row.
        notes: what gradwatch reported about the run.
        news: incidents that changed since the previous snapshot.
        clip_coefficient: norm after clipping over norm before it, of the last row.
        ending: how badly the loss stands at the last row, in words; empty if it does not.
        usual_norms: the usual range of the global norm; None: it is not known.
        clip_use: what a clip that may act on each step did; None: there is none.
    """

    facts: Facts
    step: int
    layers: Sequence[str]
    loss: Floats
    global_norm: Floats
    grad_norm: Floats
    nonfinite: NDArray[np.uint8]
    weight_norm: Floats
    closeness: Floats
    closest: NDArray[np.intp]
    rules: Sequence[str]
    firing: tuple[str, ...]
    incidents: tuple[Incident, ...]
    verdict: RunVerdict
    clipping: str | None
    clip_on: bool
    clipped: int
    skipped: int
    seconds: float
    steps_per_second: float
    cost_us: float
    provenance: Provenance
    notes: tuple[str, ...] = ()
    news: tuple[Incident, ...] = field(default=())
    clip_coefficient: float = 1.0
    ending: str = ""
    usual_norms: UsualNorms | None = None
    clip_use: ClipUse | None = None
