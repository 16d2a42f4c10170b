"""The layers of an incident in the order in which they left their band, and the prime suspect."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.columns import widened
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import EXPLOSION
from gradwatch.text.wording import counted, number
from gradwatch.verdict.opening import beyond_gradients, moved_over_possible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Phase
    from gradwatch.verdict.settings import VerdictSettings


class Suspects:
    """Keeps track of which layers are out of their band (`VerdictSettings.band`).

    Args:
        history: the history of the run, which is only read.
        settings: the limits of the verdict.
    """

    def __init__(self, history: History, settings: VerdictSettings) -> None:
        self._history = history
        self._settings = settings
        self._left = np.full(len(history.layers), -1, dtype=np.int64)

    def grow(self) -> None:
        """Extend the state to the layers of the history, to which columns were added."""
        self._left = widened(self._left, len(self._history.layers), -1)

    def follow(self, step: int) -> None:
        """Record the layers that leave their band, or return to it, in the last row."""
        surge = self._history.surge()
        self._left[(surge < self._settings.back_in_band)] = -1
        out = (surge > self._settings.band) | (self._history.nonfinite > 0)
        self._left[out & (self._left < 0)] = step

    def layers(self, signs: Sequence[Alarm]) -> tuple[str, ...]:
        """Return the layers that have a sign or are out of their band, in the order in which they left it."""
        history = self._history
        column = {layer: index for index, layer in enumerate(history.layers)}
        first: dict[str, tuple[int, float, int]] = {}
        grows = signs[0].kind in EXPLOSION  # silent signs do not take a layer out of its band
        for alarm in signs:
            if alarm.layer is None:
                continue
            index = column[alarm.layer]
            step = int(self._left[index]) if grows and 0 <= self._left[index] < alarm.step else alarm.step
            # within one step: non-finite ones in backward order, others by how far they are beyond the limit
            beyond = -alarm.value / alarm.limit if alarm.limit > 0 and np.isfinite(alarm.value) else 0.0
            # a dead layer starves all layers behind it, so the first in forward order is the cause
            place = -int(history.order[index]) if alarm.kind == "dead" else int(history.order[index])
            key = (step, beyond, place)
            first[alarm.layer] = min(first.get(alarm.layer, key), key)
        out = (self._left >= 0) & ((history.surge() > self._settings.band) | (history.nonfinite > 0))
        for index in np.flatnonzero(out).tolist() if grows else ():
            first.setdefault(history.layers[index], (int(self._left[index]), 0.0, int(history.order[index])))
        return tuple(sorted(first, key=first.__getitem__))

    def prime(
        self, signs: Sequence[Alarm], layers: Sequence[str], kind: Kind, phase: Phase | None, moved: str | None
    ) -> str | None:
        """Return the prime suspect, or None if there is none.

        Args:
            signs: the signs of the incident.
            layers: the layers of the incident, as returned by `layers`.
            kind: the kind of the incident.
            phase: where non-finite values were seen first.
            moved: the layer returned by `moved`.
        """
        odd = (
            _odd_scale(self._history)
            if signs[0].step < self._settings.first_steps and signs[0].kind in EXPLOSION
            else None
        )
        if odd or moved:
            return odd or moved
        if kind == "nonfinite" and phase == "gradient":
            return self._history.first_nonfinite()
        if kind == "nonfinite" and phase == "loss":  # where only a part of the gradients is lost, the fault is there
            lost = self._history.nonfinite > 0
            here = self._history.row.grad_norm > 0
            return self._history.first_nonfinite() if lost.any() and (here & ~lost).any() else None
        return layers[0] if layers else None

    def moved(self) -> tuple[str | None, str | None]:
        """Return the only layer whose weights something has changed, and a sentence about it; (None, None) if there is none.

        It is the one that changed suddenly, or, if the explosion has moved others since, the one that moved farther than its
        rate and its gradients explain. Weights are checked before gradients, because damage to one layer takes all gradients
        out of their band in one step.
        """
        history = self._history
        if history.row.weight_norm is None:
            return None, None
        floor = _floor(history)
        with ignore_fp_warnings():
            change = np.abs(np.log(np.maximum(history.weight, floor) / np.maximum(history.previous_weight, floor)))
        change[history.nonfinite_weight] = np.inf
        change[np.isnan(history.previous_weight)] = np.nan
        # a bias may grow to many times its size as it learns, and the rate of Adam bounds what it moves any weights
        bounded = ~history.large_matrices | (history.row.family == "adam")
        change[bounded & (moved_over_possible(history) <= 1)] = 0.0
        if np.count_nonzero(change >= 0) < 2:
            return None, None
        order = np.argsort(np.nan_to_num(change, nan=-1.0, posinf=np.inf))
        first, second = change[order[-1]], change[order[-2]]
        if not first > math.log(self._settings.moved):
            return None, None
        if not first > self._settings.alone * second:
            return self._moved_by_another(change)
        name = history.layers[int(order[-1])]
        told = (
            "became non-finite" if math.isinf(first) else f"changed its norm by a factor of {number(math.exp(first))}"
        )
        return name, (
            f"{name} {told} in the {_steps(history.weight_gap)} before step {history.row.step}, every other layer by a factor "
            f"of at most {number(math.exp(second))}"
        )

    def _moved_by_another(self, change: Floats) -> tuple[str | None, str | None]:
        """Return the only layer that moved farther than its gradients explain, given all changes in logarithms, shape (L,)."""
        times = beyond_gradients(self._history)
        moved = np.flatnonzero(times > 1)
        if len(moved) != 1 or not change[moved[0]] > math.log(self._settings.moved):
            return None, None
        name = self._history.layers[moved[0]]
        return name, (
            f"the weights of {name} moved {number(float(times[moved[0]]), 2)} times as far within "
            f"{counted(self._history.weight_gap, 'step')} until step {self._history.row.step} as its rate and its gradients can "
            "have moved it"
        )


def _steps(count: int) -> str:
    return "step" if count == 1 else counted(count, "step")


def _floor(history: History) -> Floats:
    """Return the weight norms below which changes are ignored, shape (L,).

    This is half of the norm after a usual initialisation, and an RMS of 0.1 for biases and gains.
    """
    return np.where(history.matrices, history.half_usual, 0.1 * np.sqrt(history.sizes))


def _odd_scale(history: History) -> str | None:
    """Return the layer with the largest gain if that is more than ten times the median gain, else None."""
    gain = history.relative_gain(history.first_weight)
    if not np.isfinite(gain).any() or not np.nanmax(gain) > 10:
        return None
    return history.layers[int(np.nanargmax(gain))]
