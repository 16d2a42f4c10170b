"""Comparison of two runs: where their losses and the gradient norms of their layers diverge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.errors import UsageError
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.verdict import VerdictSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats
    from gradwatch.runlog import RunLog

_LASTING = 3  # consecutive common rows, since a single batch may differ


@dataclass(frozen=True)
class Parting:
    """The steps at which two runs diverge. Three rows in a row are fewer at the end of the run.

    Attributes:
        steps: number of steps that both runs have.
        first_difference: first step at which the losses are not equal; None if they always are.
        losses: first of three rows in a row in which the losses differ by more than a factor of 1.1; None if there are none.
        layers: step, name and both gradient norms of each layer at the first of three rows in a row in which one norm is more
            than four times the other, or only one is finite; sorted by step.
        only_left, only_right: layers that the other run does not have.
    """

    steps: int
    first_difference: int | None
    losses: int | None
    layers: tuple[tuple[int, str, float, float], ...]
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]


def parting(left: RunLog, right: RunLog) -> Parting:
    """Compare two runs step by step and return where they diverge.

    Raises:
        UsageError: the runs have no layer or no step in common.
    """
    common = [name for name in left.layers if name in set(right.layers)]
    if not common:
        raise UsageError(
            f"{left.folder} and {right.folder} have no layer in common ({left.layers[0]!r}, ... and "
            f"{right.layers[0]!r}, ...). Compare two runs of the same model."
        )
    a, b = left.series(), right.series()
    steps, at_a, at_b = np.intersect1d(a.step, b.step, return_indices=True)
    if not len(steps):
        raise UsageError(f"{left.folder} and {right.folder} have no step in common.")
    loss_a, loss_b = a.loss[at_a], b.loss[at_b]
    differ = ~((loss_a == loss_b) | (np.isnan(loss_a) & np.isnan(loss_b)))
    return Parting(
        steps=len(steps),
        first_difference=_first(steps, differ),
        losses=_first(steps, _lasting(_apart(loss_a, loss_b, 1.1)[:, None])[:, 0]),
        layers=_layers(left, right, common),
        only_left=tuple(name for name in left.layers if name not in set(right.layers)),
        only_right=tuple(name for name in right.layers if name not in set(left.layers)),
    )


def _layers(left: RunLog, right: RunLog, common: list[str]) -> tuple[tuple[int, str, float, float], ...]:
    (steps_a, norms_a), (steps_b, norms_b) = left.norms(), right.norms()
    steps, at_a, at_b = np.intersect1d(steps_a, steps_b, return_indices=True)
    columns = {name: place for place, name in enumerate(left.layers)}, {name: n for n, name in enumerate(right.layers)}
    one = norms_a[at_a][:, [columns[0][name] for name in common]].astype(np.float64)
    other = norms_b[at_b][:, [columns[1][name] for name in common]].astype(np.float64)
    parted = _lasting(_apart(one, other, VerdictSettings().band))
    found = []
    for place in np.flatnonzero(parted.any(axis=0)).tolist():
        row = int(parted[:, place].argmax())
        found.append((int(steps[row]), common[place], float(one[row, place]), float(other[row, place])))
    return tuple(sorted(found, key=lambda parted: parted[0]))


def _apart(a: Floats, b: Floats, factor: float) -> NDArray[np.bool_]:
    """Return where one value is more than ``factor`` times the other, or of the other sign, or only one is finite.

    Values that are not finite in both runs count as equal.
    """
    with ignore_fp_warnings():
        far = (np.abs(a) > factor * np.abs(b)) | (np.abs(b) > factor * np.abs(a)) | (np.sign(a) * np.sign(b) < 0)
    return np.where(np.isfinite(a) & np.isfinite(b), far, np.isfinite(a) != np.isfinite(b))


def _lasting(apart: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where ``apart``, shape (n, L), holds for three rows in a row, or for all rows that are left at the end."""
    lasting = apart.copy()
    for later in range(1, _LASTING):
        lasting[:-later] &= apart[later:]
    return lasting


def _first(steps: NDArray[np.int64], found: NDArray[np.bool_]) -> int | None:
    return int(steps[found.argmax()]) if found.any() else None
