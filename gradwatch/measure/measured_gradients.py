"""Gradient norms measured at one moment, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.measure.norms import global_norm_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from gradwatch.records import Floats


@dataclass(slots=True)
class Measured:
    """Gradients and their norms at one moment.

    Attributes:
        gradients: n tensors; empty if only their norms were kept.
        columns: columns of the layers with a gradient, shape (n,).
        norms: L2 norms, shape (L,); NaN where a layer has no gradient.
        global_norm: L2 norm of all gradients as one vector.
        nonfinite: `NonFinite` codes, shape (L,); None if all gradients are finite.
        counts: numbers of NaN and infinite elements by column; None if all gradients are finite.
    """

    gradients: list[Tensor]
    columns: NDArray[np.intp]
    norms: Floats
    global_norm: float
    nonfinite: NDArray[np.uint8] | None = None
    counts: dict[int, tuple[int, int]] | None = None

    def only(self, columns: NDArray[np.intp]) -> Measured:
        """Return the measurements of the layers in ``columns`` alone."""
        there = np.isin(self.columns, columns)
        if there.all():
            return self
        norms = np.full(len(self.norms), np.nan)
        kept = self.columns[there]
        norms[kept] = self.norms[kept]
        gradients = [g for g, mine in zip(self.gradients, there, strict=False) if mine]  # empty if only norms are kept
        measured = Measured(gradients, kept, norms, global_norm_of(norms[kept]))
        counts = {column: count for column, count in (self.counts or {}).items() if column in kept}
        if counts and self.nonfinite is not None:
            measured.nonfinite, measured.counts = (
                np.where(np.isin(np.arange(len(norms)), kept), self.nonfinite, 0),
                counts,
            )
        return measured


def assembled(parts: Sequence[Measured], layers: int) -> Measured:
    """Return the measurements of one backward, merged from parts whose tensors no longer exist."""
    columns = np.concatenate([part.columns for part in parts])
    norms = np.full(layers, np.nan)
    for part in parts:
        norms[part.columns] = part.norms[part.columns]
    whole = Measured([], columns, norms, global_norm_of(norms[columns]))
    codes = [part.nonfinite for part in parts if part.nonfinite is not None]
    if codes:
        whole.nonfinite = np.zeros(layers, dtype=np.uint8)
        for code in codes:
            whole.nonfinite[: len(code)] |= code
        whole.counts = {column: count for part in parts for column, count in (part.counts or {}).items()}
    return whole
