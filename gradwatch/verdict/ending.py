"""How the loss stands at the end of a run, for runs that end badly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.history.statistics import median_and_mad
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from gradwatch.history.history import History

_LEVEL = 32  # losses whose median is the level
_ENOUGH = 100  # losses after which a run could have left the level at which it began
_NEAR = 0.05  # share of the first loss within which the level is the same


def how_it_stands(history: History) -> str:
    """Return how badly the loss stands at the last row, as the rest of a sentence that begins with "the loss"; else ""."""
    if history.lost_since is not None:
        return f"is {history.row.loss} since step {history.lost_since:,}"
    level, _ = median_and_mad(history.task_loss(last=_LEVEL))
    began = history.first_loss
    if history.losses >= _ENOUGH and not history.resting and level >= began - _NEAR * abs(began):
        return (
            f"is {number(level)}, at the level at which it began ({number(began)})"
            if level <= began + _NEAR * abs(began)
            else f"is {number(level)}, above the level at which it began ({number(began)})"
        )
    return ""
