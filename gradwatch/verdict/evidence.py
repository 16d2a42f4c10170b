"""What speaks for an incident, in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import doubling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats
    from gradwatch.verdict.story import Story

_TREND = 8  # steps over which growth is measured
_QUICK = 50.0  # longest doubling time, in steps, for which a forecast is given


class Evidence:
    """Collects the evidence for the incidents of a run.

    Args:
        history: the history of the run, which is only read.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def lines(self, signs: Sequence[Alarm], story: Story) -> tuple[str, ...]:
        """Return the evidence for an incident, a sentence each: its signs, the growth, what was found."""
        lines = []
        for code in dict.fromkeys(sign.code for sign in signs):
            same = [sign for sign in signs if sign.code == code]
            more = f" (and {len(same) - 1} more layers)" if len(same) > 1 else ""
            lines.append(f"{same[0]}{more}")
        self._find(story)
        if any(sign.sign == "growth" for sign in signs):
            lines += forecast(self._history.global_norm(last=_TREND))
        return (*lines, *story.findings)

    def _find(self, story: Story) -> None:
        """Record the layer, the elements and the processes at which the first non-finite values were found."""
        row = self._history.row
        if not story.findings and row.counts:
            layer = self._history.first_nonfinite()
            index = self._history.layers.index(layer) if layer else -1
            if index in row.counts:
                nans, infs = row.counts[index]
                story.findings.append(
                    f"first in backward order: {layer} with {nans} NaN and {infs} infinite "
                    f"of {int(self._history.sizes[index])} gradient elements at step {row.step}"
                )
        if not story.ranks and row.culprits is not None:
            story.ranks = row.culprits.ranks
            story.findings.append(f"{row.culprits} at step {row.step}")


def forecast(norms: Floats) -> list[str]:
    """Return a sentence that says when growing gradients will exceed float16 and float32; no sentence if they do not grow.

    Args:
        norms: the last global norms, shape (n,), oldest first.
    """
    steps = doubling(norms)
    if not steps <= _QUICK or not 4 * norms[0] < norms[-1] < math.inf:
        return []
    room = {np.dtype(kind).name: float(np.finfo(kind).max / norms[-1]) for kind in (np.float16, np.float32)}
    until = [f"{name} in about {max(steps * math.log2(times), 1):.0f}" for name, times in room.items() if times > 1]
    if not until:
        return []
    return [f"gradients double every {steps:.1f} steps: at this rate they exceed {' and '.join(until)} steps"]
