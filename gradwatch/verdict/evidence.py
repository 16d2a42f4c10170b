"""What speaks for an incident, in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import doubling, ignore_fp_warnings, median
from gradwatch.text.wording import about_every, counted, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Incident
    from gradwatch.verdict.recurring import Returns
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

    def lines(self, signs: Sequence[Alarm], story: Story, suspect: str | None = None) -> tuple[str, ...]:
        """Return the evidence for an incident, a sentence each: its signs, the growth, what was found.

        Args:
            signs: the alarms of the incident, in the order in which they began to fire.
            story: the story of the incident, to which what is found is added.
            suspect: the prime suspect, whose sign speaks for those of other layers.
        """
        codes = dict.fromkeys(sign.code for sign in signs)
        lines = [said([sign for sign in signs if sign.code == code], suspect) for code in codes]
        self._find(story)
        if any(sign.sign == "growth" for sign in signs):
            norms = self._history.global_norm(last=self._history.task_rows)
            highest = norms[-1] >= np.fmax.reduce(norms)  # else norms are as they were before
            lines += forecast(norms[-_TREND:], self._history.row.step) if highest else []
        return (*lines, *story.findings)

    @staticmethod
    def returned(incident: Incident, last: Returns) -> tuple[str, ...]:
        """Return that steps of an open incident were not finite again; () if they were not."""
        times = last.times - incident.times
        if not times:
            return ()
        pace = about_every(last.period, last.step - incident.opened_step, times)
        return (f"not finite again {'once' if times == 1 else counted(times, 'time')}, last at step {last.step}{pace}",)

    def _find(self, story: Story) -> None:
        """Record the layer, the elements and the processes at which the first non-finite values were found."""
        row = self._history.row
        if not story.findings and row.counts:
            layer = self._history.first_nonfinite()
            index = self._history.layers.index(layer) if layer else -1
            if index in row.counts:
                found = zip(row.counts[index], ("NaN", "infinite"), strict=True)
                story.findings.append(
                    f"first in backward order: {layer} with {' and '.join(f'{n:,} {what}' for n, what in found if n)} of "
                    f"{counted(self._history.sizes[index], 'gradient element')} at step {row.step}"
                )
        if not story.ranks and row.culprits is not None:
            story.ranks = row.culprits.ranks
            story.findings.append(f"{row.culprits} at step {row.step}")


def said(signs: Sequence[Alarm], suspect: str | None) -> str:
    """Return the sentence of the alarms of one rule: that of the suspect if it was among the first, else the largest of these."""
    first = [sign for sign in signs if sign.step == signs[0].step]
    one = next((sign for sign in first if sign.layer == suspect), max(first, key=lambda sign: sign.value))
    if len(signs) == 1:
        return str(one)
    last = max(sign.step for sign in signs)
    until = f" by step {last}" if last > one.step else ""
    return f"{one.sentence}; the same rule fired for {counted(len(signs) - 1, 'more layer')}{until} ({one.code})"


def forecast(norms: Floats, step: int) -> list[str]:
    """Return a sentence that says when growing gradients will exceed float16 and float32; no sentence if they do not grow.

    A jump of one step has no pace: the growth of the other steps counts, the median of the last three steps has to keep half of
    the pace, and the last norm has to be the largest.

    Args:
        norms: the last global norms, shape (n,), oldest first.
        step: the step of the last one.
    """
    steps = doubling(norms)
    with ignore_fp_warnings():
        grown = norms[1:] / norms[:-1]
        jump = np.fmax.reduce(grown, initial=1.0)
    if not steps <= _QUICK or not 4 * jump * norms[0] < norms[-1] < math.inf or norms[-1] < np.fmax.reduce(norms):
        return []
    if not median(grown[-3:]) >= 2 ** (0.5 / steps):
        return []
    room = {np.dtype(kind).name: float(np.finfo(kind).max / norms[-1]) for kind in (np.float16, np.float32)}
    until = {
        name: counted(max(round(steps * math.log2(times)), 1), "step") for name, times in room.items() if times > 1
    }
    if not until:
        return []
    ends = " and ".join(f"{name} in about {more}" for name, more in until.items())
    pace = number(steps, 2)
    grow = f"gradients double every {pace} step{'s' * (pace != '1')}"
    if steps < 1:
        grow = f"gradients become {number(2 ** (1 / steps), 2)} times as large with each step"
    return [f"at step {step}, {grow}: at this pace they exceed {ends}"]
