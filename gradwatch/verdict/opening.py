"""What was known of a run when an incident opened. Advice goes by it: later, rates and weights are those of the damage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.statistics import ignore_fp_warnings

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats

_FIRST = 12  # steps in which the weights are still those of the initialisation
_ODD = 10.0  # gain of one matrix, relative to the median one, beyond which it is named
_LARGE = 4.0  # median gain beyond which all matrices are too large; usual initialisations have 0.6 to 1.4
_REMEMBERED = 32  # earlier updates that still move the weights by momentum
_USUAL_UPDATE = 1e-3  # share of its weights that an update usually changes


@dataclass(frozen=True)
class Opening:
    """The run at the opening of an incident.

    Attributes:
        step: the step.
        rate: learning rate of the suspect, or the largest one; NaN if none is known.
        first_rate: first learning rate above zero; NaN if none is known.
        large: times by which weights are too large for their number of inputs, in the first steps; NaN if they are not.
        large_layer: the only matrix of which that is so, compared with the median one; None: all are, compared with a usual one.
        moved_layer: the matrix that moved farther than rate and gradients explain; None: none did, or it is not known.
        moved: times as far as they explain at most.
        usual_rate: learning rate at which an update would change a thousandth of the suspect; NaN if it is not known.
    """

    step: int
    rate: float
    first_rate: float = math.nan
    large: float = math.nan
    large_layer: str | None = None
    usual_rate: float = math.nan
    moved_layer: str | None = None
    moved: float = math.nan

    @property
    def young(self) -> bool:
        """True in the first steps of the run."""
        return self.step < _FIRST


def opening_of(history: History, suspect: str | None) -> Opening:
    """Return what is known now, at the opening of an incident with this suspect."""
    step, column = history.row.step, history.layers.index(suspect) if suspect in history.layers else None
    own = math.nan if column is None else float(history.rate[column])
    rate = own if math.isfinite(own) else float(np.fmax.reduce(history.rate, initial=math.nan))
    layer, times = _too_large(history) if step < _FIRST else (None, math.nan)
    usual = math.nan if column is None else _usual_rate(history, column)
    return Opening(step, rate, history.first_rate, times, layer, usual, *_moved_by_another(history))


def _too_large(history: History) -> tuple[str | None, float]:
    relative = history.relative_gain()
    if np.isfinite(relative).any() and np.nanmax(relative) > _ODD:
        return history.layers[int(np.nanargmax(relative))], float(np.nanmax(relative))
    gains = (history.weight * np.sqrt(history.fan_in / history.sizes))[history.large_matrices]
    gains = gains[np.isfinite(gains)]
    middle = float(np.median(gains)) if gains.size else math.nan
    return None, middle if middle > _LARGE else math.nan


def beyond_gradients(history: History) -> Floats:
    """Return how far each matrix's norm has changed since the sample before, over what SGD can have done at most, shape (L,).

    With momentum ``m``, a gradient moves the weights by at most ``1 / (1 - m)`` times its length. 0.0 where it is not known.
    """
    unknown = np.zeros(len(history.layers))
    rows = min(history.weight_gap + _REMEMBERED, history.task_rows)
    steps, norms = history.steps(last=rows), history.grad_norm(last=rows)[:-1]
    momentum = history.facts.momentum
    if history.row.family != "sgd" or not len(norms) or steps[-1] - steps[0] >= rows or not 0 <= momentum < 1:
        return unknown
    with ignore_fp_warnings():
        rates = history.learning_rate(last=rows)
        fallen = max(1.0, float(np.fmax.reduce(rates) / rates[-1]))  # a rate that was cut meanwhile was higher before
        explained = fallen * history.previous_rate * np.nansum(norms, axis=0) / (1 - momentum)
        times = np.abs(history.weight - history.previous_weight) / explained
    return np.where(history.large_matrices & np.isfinite(times), times, unknown)


def _moved_by_another(history: History) -> tuple[str | None, float]:
    """Return the matrix that moved most beyond what SGD can have done, and how many times as far; (None, NaN) if none did."""
    times = beyond_gradients(history)
    most = int(np.argmax(times))
    return (history.layers[most], float(times[most])) if times[most] > 1 else (None, math.nan)


def _usual_rate(history: History, column: int) -> float:
    length = math.sqrt(history.sizes[column]) if history.row.family == "adam" else history.row.grad_norm[column]
    known = history.row.family in ("sgd", "adam") and length > 0
    return float(_USUAL_UPDATE * history.weight[column] / length) if known else math.nan
