"""`Snapshot`: the state of a run at one step, and the `Facts` of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.records.kinds import Behind, Family  # noqa: TC001  pydantic reads the annotations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gradwatch.records.answers import ClipUse, UsualNorms
    from gradwatch.records.incident import Incident
    from gradwatch.records.kinds import Floats, RunVerdict
    from gradwatch.records.row import Provenance


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
        optimizer_options: options of the optimizer except its learning rate, as they were when it was found, as text by name.
        prediction: shape of what the first loss compared with a target; empty if it is not known, or if later losses differ.
        behind: what stands between the root of the first backward and that loss; "more" if later losses differ.
        mean: whether that loss is a mean over the batch.
        narrow: whether some parameters are numbers of 16 bits.
        opposed_since: step since which two optimizers are known to take turns, where the loss of one runs through what the other
            trains; None: they are not.
        dropouts: names of the dropout modules that drop everything.
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
    name: str = ""  # logs of earlier versions do not have this and what follows
    optimizer_options: dict[str, str] = field(default_factory=dict, hash=False)
    prediction: tuple[int, ...] = ()
    behind: Behind = "more"
    mean: bool = False
    narrow: bool = False
    opposed_since: int | None = None
    dropouts: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """The name that the user gave and the class of the model; only the class if there is no name."""
        return f"{self.name} ({self.model})" if self.name else self.model

    @property
    def momentum(self) -> float:
        """The momentum of the optimizer; 0.0 if none is known, or not the same in each of its groups."""
        return self.option("momentum")

    @property
    def decay(self) -> float:
        """The weight decay, where it is decoupled from the gradient; 0.0 if it is not, or not the same in each group."""
        decoupled = self.optimizer == "AdamW" or self.optimizer_options.get("decoupled_weight_decay") == "True"
        return self.option("weight_decay") if decoupled else 0.0

    @property
    def set_rate(self) -> float:
        """The learning rate that a scheduler was given as the highest one; 0.0 if none is known, or not one for all groups."""
        return self.option("max_lr") or self.option("initial_lr")

    @property
    def maximizes(self) -> bool:
        """Whether the optimizer raises what backward begins at, in each of its groups."""
        return self.optimizer_options.get("maximize") == "True"

    @property
    def betas(self) -> tuple[float, float] | None:
        """The decays of Adam's two averages; None for other optimizers, or if they are not the same in each group."""
        first, _, second = self.optimizer_options.get("betas", "").strip("()").partition(", ")
        try:
            return (float(first), float(second)) if "adam" in (self.optimizer or "").lower() else None
        except ValueError:
            return None

    @property
    def has_decay(self) -> bool:
        """Whether any group has a weight decay above zero."""
        return any(char in "123456789" for char in self.optimizer_options.get("weight_decay", ""))

    def option(self, name: str) -> float:
        """Return a number among the options of the optimizer; 0.0 if it is not known, or not the same in each group."""
        try:
            return float(self.optimizer_options.get(name, 0.0))
        except ValueError:  # several values, one for each group
            return 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one step, which each report receives. The series hold the last rows, oldest first.

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
        scaled_up: number of steps whose gradients auto-clip made larger.
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
    scaled_up: int = 0

    @property
    def measured(self) -> bool:
        """True if a layer had a gradient in the last row, be it one that is not finite."""
        return bool(self.nonfinite.any() or not np.isnan(self.grad_norm).all())

    @property
    def clip_of_all(self) -> str:
        """The clip of auto-clip in words that a count of all its steps may follow: it may have had other bounds before."""
        had = {
            clip for one in self.incidents if one.clip is not None for clip in (one.clip.narrowed_from, one.clip.clip)
        }
        return f"last set to {self.clipping}" if had - {"", self.clipping} else str(self.clipping)

    @property
    def not_clipped(self) -> str:
        """What auto-clip did to steps that it did not clip, in words."""
        return (f"{self.scaled_up:,} scaled up, " if self.scaled_up else "") + f"{self.skipped:,} skipped"
