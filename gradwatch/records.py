"""The words of the library: Row, Alarm, Incident, ClipRecord, Facts, Snapshot.

Plain frozen data. Nothing here imports torch, so all of it can be kept, sent and shown anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gradwatch.printable import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

Sign = Literal["subtle", "confirming", "growth", "numeric", "silent", "clip"]
Role = Literal["", "surge", "jump", "update", "overshoot", "damage"]
Kind = Literal["exploding", "spike", "nonfinite", "diverging", "vanishing", "stalled", "dead", "frozen", "clipping"]
Severity = Literal["notice", "warning", "critical"]
Verdict = Literal["suspected", "confirmed", "resolved"]
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
EXPLOSION: tuple[Kind, ...] = ("exploding", "spike", "nonfinite", "diverging")  # chapters of one story


class NonFinite(IntFlag):
    """What a gradient held that is not a finite number."""

    NONE = 0
    NAN = 1
    INF = 2


class Provenance(NamedTuple):
    """Where a row's gradient norms come from: no number without it.

    ``source``: the moment of measuring. ``clipped``: before or after the user's own clipping, where that is known.
    ``processes``: those whose parts make up the numbers; losses are their mean. 1: the numbers are this process's own.
    """

    source: Source = "optimizer step"
    clipped: Clipped = "as the optimizer sees it"
    loss: LossSource = "none"
    processes: int = 1

    def __str__(self) -> str:
        of = f", of all {self.processes} processes" if self.processes > 1 else ""
        return f"measured at {self.source}, {self.clipped}{of}; loss from {self.loss}"


class Culprits(NamedTuple):
    """The processes that a non-finite step came from: only their own loss, backward or gradients were not finite."""

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
    """The numbers of one optimizer step. ``L`` is the number of layers; missing is NaN.

    ``optimizer``: the number of the optimizer that steps, in the order in which they were found; -1 where none of torch's
    makes the update, or many do inside backward.
    ``poisoned``: what the optimizer is about to use is not finite (``nonfinite`` may tell of before the user's clip).
    ``family`` is the optimizer's. ``applied`` is the factor that the user's own clipping put on the gradients (1.0: none
    was seen).
    ``rate`` (L,) is the learning rate of each layer's parameter group. ``counts`` maps a layer's column to its number
    of (NaN, Inf) gradient elements and exists only for steps with non-finite gradients. ``order`` (L,) is the place of each
    layer in the order in which gradients arrived in backward; None: as in the row before.
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
        """False when no loss was seen; then ``loss`` is NaN for "missing"."""
        return self.provenance.loss != "none"

    @property
    def loss_nonfinite(self) -> bool:
        """True when a loss was seen and it is NaN or infinite."""
        return self.has_loss and not math.isfinite(self.loss)


@dataclass(frozen=True, slots=True, repr=False)
class Alarm:
    """A change of state of one rule on one layer (``None``: the whole model)."""

    code: str
    name: str
    sign: Sign
    kind: Kind
    layer: str | None
    step: int
    value: float
    limit: float
    state: Literal["firing", "resolved"] = "firing"

    def __repr__(self) -> str:
        return f"<Alarm {self}, {self.state}>"

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        return printable(f"{self.code} {self.name}{where}: {self.value:.3g} > {self.limit:.3g} at step {self.step}")


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What auto-clip did about an incident, and whether it helped (``None``: not known yet).

    ``norm_before`` is the largest global norm meanwhile, ``norm_after`` what was left of it. ``loss_before`` and
    ``loss_after`` are levels. ``recovered_after``: steps after which the loss was back at its level for good. ``measures``
    are those beyond clipping, in words. ``unlearned``: the level of the clipped steps' losses at first and at last, where
    clipping kept them up while all others were well; the clip was let go at once.
    ``damage``: what of the model was not finite when it let go, so that nothing helped.
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
        """The share of the steps since ``from_step`` that were clipped; NaN before the first."""
        return self.clipped / self.steps if self.steps else math.nan

    def __str__(self) -> str:
        parts = [f"{self.clip} clipped {self.clipped} of {self.steps} steps"]
        if self.skipped:
            parts[0] += f", {self.skipped} skipped"
        if math.isfinite(self.norm_before):
            left = f" -> {self.norm_after:.3g}" if math.isfinite(self.norm_after) else ""
            parts.append(f"largest norm {self.norm_before:.3g}{left}")
        parts += self.measures
        if self.released_step is None:
            return "; ".join([*parts, "still on"])
        parts.append(f"loss {self.loss_before:.3g} -> {self.loss_after:.3g}")
        if self.recovered_after is not None:
            parts[-1] += f", back to its level after {self.recovered_after} steps"
        return "; ".join([*parts, f"released at step {self.released_step}: {self._outcome}"])

    @property
    def _outcome(self) -> str:
        if self.helped:
            return "it helped"
        if self.damage:
            return f"the model is damaged, {self.damage}; go back to a checkpoint"
        if self.unlearned is not None:
            before, after = self.unlearned
            return (
                f"the losses of the steps that it clipped did not come down, {before:.3g} -> {after:.3g}, while the others were "
                f"well: they carry a rare signal. It is not switched on again for gradients up to {self.norm_before:.3g}"
            )
        why = ": such an optimizer divides gradients by their own size" if self.family == "adam" else ""
        return f"clipping did not help, the learning rate is the likelier cause{why}"


@dataclass(frozen=True, slots=True, repr=False)
class Incident:
    """Alarms of one story. Replaced, never changed: what a report holds stays as it was.

    ``layers`` stand in the order in which they left their band; ``suspect`` is the prime suspect.
    ``phase`` says where non-finite values were seen first. Steps count optimizer steps from 0. ``ranks`` are the processes
    of a distributed training that non-finite values came from, where that could be told. ``number`` counts the incidents of
    a run from 0.
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

    @property
    def open(self) -> bool:
        """True until the run has been calm again."""
        return self.closed_step is None

    def __repr__(self) -> str:
        return f"<Incident {self}>"

    def __str__(self) -> str:
        steps = f"step {self.opened_step}" + (f" to {self.closed_step}" if self.closed_step is not None else "")
        suspect = f", prime suspect {self.suspect}" if self.suspect else ""
        return printable(f"{self.kind} {self.verdict} ({self.severity}), {steps}{suspect}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the model and its optimizer, for advice and reports. ``clips_always``: auto-clip acts on each step."""

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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a report may know of a step. ``L`` layers; the series hold the last rows, oldest first.

    ``closeness`` (L,) is each layer's largest value over limit among all rules, ``closest`` (L,) the index in
    ``rules`` of the rule it belongs to. ``cost_us`` is gradwatch's own time per optimizer step. ``firing`` names the rules that
    fire now; ``news`` are the incidents that changed since the snapshot before. ``clip_coefficient`` is the last row's.
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
    verdict: str
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
