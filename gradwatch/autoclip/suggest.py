"""Suggest a clip threshold from a run's own norms, whether they come from a history, a run log or a written series.

Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.errors import UsageError
from gradwatch.history.typical_norm import LEAST_NORMS, typical_norm
from gradwatch.text.wording import counted, number

if TYPE_CHECKING:
    from gradwatch.records import Floats

_TIMES = (0.5, 1.0, 2.0, 5.0, 10.0)  # multiples of the typical norm for which clipping converges, Pascanu et al. 2013
_CUSTOMARY = 1.0
_RARE = 0.01  # largest share of steps that a clip for outliers may clip


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate threshold, where it comes from, and the number of observed steps whose norm was above it."""

    threshold: float
    why: str
    clipped: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The suggested threshold for the global norm, and the norms that it is based on.

    Attributes:
        threshold: the suggested threshold, which is one of ``choices``.
        typical: the typical norm of the run (`gradwatch.history.typical_norm`).
        largest: the largest finite norm.
        steps: number of norms that are finite and positive.
        nonfinite: number of norms that were not finite.
        choices: all candidates, sorted by threshold.
    """

    threshold: float
    typical: float
    largest: float
    steps: int
    nonfinite: int
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        left_out = f", {self.nonfinite} more were not finite" if self.nonfinite else ""
        lines = [
            f"Clip the global norm at {number(self.threshold)}: attach(model, clip=gradwatch.ClipNorm({self.threshold:.3g})).",
            f"Typical norm {number(self.typical)}, largest {number(self.largest)}, over {self.steps:,} steps{left_out}.",
            "",
            f"{'threshold':>10}  {'would have clipped':>22}",
        ]
        for choice in self.choices:
            share = f"{choice.clipped:,} steps ({100 * choice.clipped / self.steps:.1f} %)"
            mark = "  <- suggested" if choice.threshold == self.threshold else ""
            lines.append(f"{number(choice.threshold):>10}  {share:>22}  {choice.why}{mark}")
        return "\n".join(lines)


def suggest(norms: Floats) -> Suggestion:
    """Return the threshold that these global norms suggest.

    It is the smallest candidate between one and ten times the typical norm that would have clipped at most one step in a
    hundred; if there is none, ten times the typical norm.

    Args:
        norms: global norms before any clip, shape (n,). NaN and Inf are counted but not used; zeros are not used.

    Raises:
        UsageError: fewer than 16 norms are finite and larger than zero.

    >>> print(suggest(np.array([0.5] * 60 + [0.6] * 39 + [30.0])).threshold)
    1.0
    """
    norms = np.asarray(norms, dtype=np.float64)
    finite = norms[np.isfinite(norms) & (norms > 0)]
    if finite.size < LEAST_NORMS:
        raise UsageError(
            f"A threshold was requested after {counted(finite.size, 'step')} with a finite norm; expected at least "
            f"{LEAST_NORMS}. Train on without a clip, then ask again."
        )
    typical = typical_norm(finite)
    named = {times * typical: f"{times:g} times the typical norm" for times in _TIMES}
    named[_CUSTOMARY] = "the customary default" + (f", {named[_CUSTOMARY]}" if _CUSTOMARY in named else "")
    choices = tuple(Choice(bound, why, int(np.count_nonzero(finite > bound))) for bound, why in sorted(named.items()))
    rare = [c.threshold for c in choices if typical <= c.threshold <= 10 * typical and c.clipped <= _RARE * finite.size]
    return Suggestion(
        threshold=rare[0] if rare else 10 * typical,
        typical=typical,
        largest=float(finite.max()),
        steps=int(finite.size),
        nonfinite=int(np.count_nonzero(~np.isfinite(norms))),
        choices=choices,
    )
