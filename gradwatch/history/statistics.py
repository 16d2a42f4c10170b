"""Robust statistics, each with its formula, symbols, shapes and source.

All of them ignore values that are not finite, so a single NaN or Inf does not affect later results.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gradwatch.records import Floats

# NaN and Inf are data here, so numpy must not warn of them. Entered once per step, because it costs a microsecond
ignore_fp_warnings = functools.partial(np.errstate, all="ignore")

_FEW = 8  # number of layers up to which plain numbers are faster than arrays
MAD_TO_SIGMA = 1.4826  # makes the MAD of a normal sample an estimate of its standard deviation


def median_and_mad(values: Floats) -> tuple[float, float]:
    """Return the median m and the scaled median absolute deviation s of the finite values.

    ``m = median(x)``, ``s = 1.4826 * median(|x - m|)``; both are NaN if no value is finite.
    Source: Leys et al., "Detecting outliers", J. Exp. Soc. Psychology 49 (2013).
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    middle = median(finite)
    return middle, MAD_TO_SIGMA * median(np.abs(finite - middle))


def median(values: Floats) -> float:
    """Return the median of finite values; NaN if there are none.

    For a few dozen values, sorting is six times as fast as ``np.median``.
    """
    if not len(values):
        return math.nan
    ordered = np.sort(values)
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else ordered[half - 1] / 2 + ordered[half] / 2)


def doubling(values: Floats) -> float:
    """Return the number of steps in which a quantity doubles: ``1 / slope`` of the least-squares line through ``log2 x_t``.

    ``values`` has shape (n,), oldest first; values that are not finite or not positive are ignored. Infinite if the quantity
    does not grow or fewer than three values remain.
    """
    with ignore_fp_warnings():
        logs = np.log2(values)
    use = np.flatnonzero(np.isfinite(logs))
    if use.size < 3:
        return math.inf
    time = use - use.mean()
    slope = float((time * logs[use]).sum() / np.square(time).sum())
    return 1 / slope if slope > 0 else math.inf


@functools.lru_cache
def _triangle(k: int, rate: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the powers 0 to k of ``1 - rate``, and the weight of each of k values in each of the k averages, (k, k)."""
    decays = (1.0 - rate) ** np.arange(k + 1)
    ages = np.subtract.outer(np.arange(k), np.arange(k))
    return decays, np.where(ages >= 0, rate * (1.0 - rate) ** np.maximum(ages, 0), 0.0)


class Typical:
    """The typical size of L positive quantities: an exponential moving average of their logarithms.

    ``b <- b + a_n * clamp(log x - b, -w, w)`` with ``a_n = max(1 / n, 1 - 0.5 ** (1 / half_life))``: a plain mean of the
    first logs, then an exponential average. The clamp ``w = log(4)`` (winsorising) lets one wild value move the average
    by at most ``a_n * w``, while a lasting change of level is followed eventually. Zero, NaN and Inf are ignored.

    Attributes:
        value: ``exp(b)``, shape (L,); NaN before the first value of a layer.
        scatter: the same average of ``min(|log x - b|, w)``, shape (L,).
        seen: number of values used, shape (L,).
    """

    _WINSOR = math.log(4.0)

    def __init__(self, layers: int, half_life: float) -> None:
        self._log = np.full(layers, np.nan)
        self._rate = 1.0 - 0.5 ** (1.0 / half_life)
        self.seen = np.zeros(layers, dtype=np.int64)
        self.value = np.full(layers, np.nan)
        self.scatter = np.zeros(layers)

    def update(self, x: Floats) -> None:
        """Update with one value per layer, shape (L,). Call it under `ignore_fp_warnings`, since the log of zero is expected."""
        log = np.log(x)
        use = np.isfinite(log)
        self.seen += use
        np.copyto(self._log, log, where=use & np.isnan(self._log))
        step = np.where(use, log - self._log, 0.0)
        np.clip(step, -self._WINSOR, self._WINSOR, out=step)
        weight = np.where(use, np.maximum(self._rate, 1.0 / np.maximum(self.seen, 1)), 0.0)
        self.scatter += weight * (np.abs(step) - self.scatter)
        self._log += weight * step
        np.exp(self._log, out=self.value)

    def update_all(self, rows: Floats) -> None:
        """Update with ``rows`` (k, L), oldest first: the same as k calls of `update`, at the cost of two or three.

        With a constant weight and no clamped step, ``b_i = d b_(i-1) + (1 - d) log x_i`` is one triangular product.
        """
        k = len(rows)
        if k == 1 or not self.seen.size:
            for row in rows:
                self.update(row)
            return
        logs = np.log(rows)
        decays, products = _triangle(k, self._rate)
        means = products @ logs
        means += decays[1:, None] * self._log
        steps = np.abs(logs - np.concatenate([self._log[None], means[:-1]]))
        # the product is wrong where a step is clamped or missing, or a layer has few values yet
        even = (steps.max(axis=0) <= self._WINSOR) & (self.seen * self._rate >= 1)
        uneven = np.flatnonzero(~even)
        if len(uneven) > _FEW:
            for row in rows:
                self.update(row)
            return
        log, scatter = means[-1], products[-1] @ steps + decays[-1] * self.scatter
        self.seen[even] += k
        for column in uneven.tolist():
            log[column], scatter[column] = self._follow(column, logs[:, column].tolist())
        self._log, self.scatter = log, scatter
        np.exp(self._log, out=self.value)

    def _follow(self, column: int, logs: list[float]) -> tuple[float, float]:
        """Do what `update` does for one layer, value by value; return its mean and scatter."""
        mean, scatter, seen = float(self._log[column]), float(self.scatter[column]), int(self.seen[column])
        for log in logs:
            if not math.isfinite(log):
                continue
            seen += 1
            if math.isnan(mean):
                mean = log
            step = min(max(log - mean, -self._WINSOR), self._WINSOR)
            weight = max(self._rate, 1.0 / seen)
            scatter += weight * (abs(step) - scatter)
            mean += weight * step
        self.seen[column] = seen
        return mean, scatter

    def state_dict(self) -> dict[str, list[float]]:
        """Return the state as plain lists, which fit into any file."""
        return {"log": self._log.tolist(), "scatter": self.scatter.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Floats | list[float]]) -> None:
        """Restore what `state_dict` returned, unchecked; `gradwatch.history.saved` checks states that come from outside."""
        self._log = np.array(state["log"], dtype=np.float64)
        self.scatter = np.array(state["scatter"], dtype=np.float64)
        self.seen = np.array(state["seen"], dtype=np.int64)
        self.value = np.exp(self._log)
