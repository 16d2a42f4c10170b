"""`Row`: the values of one optimizer step, and where they are from."""

from __future__ import annotations

import math
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.records.kinds import Clipped, CulpritSign, Family, LossSource, Source  # noqa: TC001  pydantic reads them

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gradwatch.records.kinds import Floats

SCALED_UP = 1 + 1e-6  # clip coefficient beyond which gradients were made larger, and not only measured again


class NonFinite(IntFlag):
    """The kinds of non-finite values in a gradient."""

    NONE = 0
    NAN = 1
    INF = 2


# the words for a reader; those of the fields are kept in run logs
_CLIPPED: dict[Clipped, str] = {
    "no clip before it seen": "no clip seen before it",
    "before the user's clip": "before your own clip",
    "as the optimizer sees it": "as the optimizer sees it",
}
_LOSS: dict[LossSource, str] = {
    "monitor.loss()": "loss from monitor.loss()",
    "closure": "loss from the closure",
    "backward root": "loss from the tensor that backward() began at",
    "written": "loss as written",
    "none": "no loss seen in this step",
}


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
        at = "a step that the scaler left out" if self.source == "left out by the scaler" else self.source
        return f"measured at {at}, {_CLIPPED[self.clipped]}{of}; {_LOSS[self.loss]}"


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
        rate: learning rate of each layer's parameter group, shape (L,); NaN if it is not known, and for layers that are frozen
            or not of the optimizer that made the step.
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
        loss_scale: factor of the gradient scaler that made the step; NaN if there was none.
        buffers_well: whether all buffers of the model are finite, but for infinities of before the run; None: not sampled.
        begins_task: whether a new task is known to begin with it (see `gradwatch.history.History.begin_task`).
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
    loss_scale: float = float("nan")
    buffers_well: bool | None = None
    begins_task: bool = False

    @property
    def has_loss(self) -> bool:
        """True if a loss was seen; otherwise ``loss`` is NaN, which stands for a missing value."""
        return self.provenance.loss != "none"

    @property
    def loss_nonfinite(self) -> bool:
        """True if a loss was seen and it is NaN or infinite."""
        return self.has_loss and not math.isfinite(self.loss)


class Scalars(NamedTuple):
    """The scalars of ``n`` rows, oldest first, each of shape (n,). Missing values are NaN.

    Attributes:
        step: optimizer steps.
        loss: losses.
        global_norm: L2 norms of all gradients as one vector, before any clip that gradwatch saw or made.
        clip_coefficient: norms after clipping divided by those before; 1.0 where nothing was clipped.
        skipped: whether auto-clip left the step out.
        learning_rate: largest learning rate among the layers that the optimizer of the step holds.
        loss_scale: factors of the gradient scaler that made the step; NaN where there was none.
    """

    step: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    clip_coefficient: Floats
    skipped: NDArray[np.bool_]
    learning_rate: Floats
    loss_scale: Floats
