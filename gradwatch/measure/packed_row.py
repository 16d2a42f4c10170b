"""The numbers of one row as one flat float64 vector, to be exchanged between processes or copied from a device.

Squares, counts and flags are additive, so one sum over all processes turns the numbers of the parts into those of the whole.
Numbers that several processes hold alike are multiplied by a share of one over the number of these processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.records import NonFinite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats

# rows with one number per layer
SQUARE, PRESENT, NANS, INFS, WEIGHT, DEAD, CHANGED = range(7)
_ROWS = 7
# followed by single numbers
NOW, LOSS, LOSSES, FAILED, AFTER, COEFFICIENT, SKIPPED, LEFT_OUT, SCALE = range(9)
_SINGLES = 9
# followed by rows with one number per process, by which all processes reach the same decision
FLAGS, EVERY, FAILED_RULES, DECIDED = range(4)
_OF_EACH = 4
# flags: which numbers of a process are not finite, whether it watches closely, whether its scaler leaves out the step
LOSS_BAD, BACKWARD_BAD, GRADIENT_BAD, BUFFER_BAD, CLOSELY, LEAVES_OUT = 1, 2, 4, 8, 16, 32


class PackedRow:
    """The numbers of one row as a flat vector with three views.

    Args:
        layers: number ``L`` of layers.
        processes: number ``W`` of processes.
        flat: vector of `size_of` numbers; None: zeros, to be filled in.

    Attributes:
        rows: numbers per layer, shape (7, L).
        singles: single numbers, shape (9,).
        ranks: numbers per process, shape (4, W).
    """

    def __init__(self, layers: int, processes: int = 1, flat: Floats | None = None) -> None:
        self.flat: Floats = np.zeros(size_of(layers, processes)) if flat is None else flat
        self.rows = self.flat[: _ROWS * layers].reshape(_ROWS, layers)
        self.singles = self.flat[_ROWS * layers :][:_SINGLES]
        self.ranks = self.flat[_ROWS * layers + _SINGLES :].reshape(_OF_EACH, processes)


def size_of(layers: int, processes: int) -> int:
    """Return the number of numbers in a `PackedRow`."""
    return _ROWS * layers + _SINGLES + _OF_EACH * processes


@dataclass(slots=True)
class UnpackedRow:
    """The numbers of a `PackedRow` on the host, by name. Arrays have shape (L,), except ``ranks`` (4, W); missing is NaN."""

    grad_norm: Floats
    global_norm: float
    nonfinite: NDArray[np.uint8] | None
    counts: dict[int, tuple[int, int]] | None
    now_norm: float
    loss: float | None
    weight_norm: Floats
    dead_share: Floats
    changed: NDArray[np.bool_]
    failed: bool
    after_norm: float
    coefficient: float
    skipped: bool
    left_out: float
    ranks: NDArray[np.int64]
    loss_scale: float

    @property
    def buffers_are_well(self) -> bool:
        """True if no process has found a buffer that is not finite, given that they were looked at."""
        return not (self.ranks[FLAGS] & BUFFER_BAD).any()

    @classmethod
    def of(cls, table: PackedRow) -> UnpackedRow:
        """Unpack ``table``."""
        rows, singles = table.rows, table.singles
        present = rows[PRESENT] > 0
        norms = np.where(present, np.sqrt(rows[SQUARE]), np.nan)
        nans = (present & np.isnan(norms)) | (rows[NANS] > 0)
        infs = (present & np.isinf(norms)) | (rows[INFS] > 0)
        nonfinite = counts = None
        if nans.any() or infs.any():
            nonfinite = (nans * int(NonFinite.NAN) + infs * int(NonFinite.INF)).astype(np.uint8)
            counted = np.flatnonzero(rows[NANS] + rows[INFS]).tolist()
            counts = {i: (round(float(rows[NANS, i])), round(float(rows[INFS, i]))) for i in counted}
        return cls(
            grad_norm=norms,
            global_norm=float(np.sqrt(rows[SQUARE][present].sum())) if present.any() else np.nan,
            nonfinite=nonfinite,
            counts=counts,
            now_norm=float(np.sqrt(singles[NOW])),
            loss=float(singles[LOSS] / singles[LOSSES]) if singles[LOSSES] > 0 else None,
            weight_norm=np.sqrt(rows[WEIGHT]),
            dead_share=rows[DEAD].copy(),
            changed=rows[CHANGED] > 0,
            failed=bool(singles[FAILED] > 0),
            after_norm=float(np.sqrt(singles[AFTER])),
            coefficient=float(singles[COEFFICIENT]),
            skipped=bool(singles[SKIPPED] > 0),
            left_out=float(singles[LEFT_OUT]),
            ranks=table.ranks.astype(np.int64),
            # each process adds that of its own scaler; none adds one if there is no scaler
            loss_scale=float(singles[SCALE]) / table.ranks.shape[1] if singles[SCALE] > 0 else np.nan,
        )
