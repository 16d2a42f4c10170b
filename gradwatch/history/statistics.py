"""Robust statistics: formula, symbols, shapes and source of each.

All of them look at finite values only, so that one NaN or Inf never poisons what comes after it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.history.columns import widened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gradwatch.records import Floats

# NaN and Inf are data here: numpy shall not warn of them. Entered once a step, for it costs a microsecond
quiet_numpy = functools.partial(np.errstate, all="ignore")

_FEW = 8  # layers up to which plain numbers beat arrays
MAD_TO_SIGMA = 1.4826  # makes the MAD of a normal sample an estimate of its standard deviation


def median_and_mad(values: Floats) -> tuple[float, float]:
    """Return the median m and the scaled median absolute deviation s of the finite values.

    ``m = median(x)``, ``s = 1.4826 * median(|x - m|)``; both NaN when no value is finite.
    Source: Leys et al., "Detecting outliers", J. Exp. Soc. Psychology 49 (2013).
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    middle = median(finite)
    return middle, MAD_TO_SIGMA * median(np.abs(finite - middle))


def median(values: Floats) -> float:
    """Return the median of finite values; for a few dozen of them, sorting is six times as quick as numpy's median.

    NaN where there are none.
    """
    if not len(values):
        return math.nan
    ordered = np.sort(values)
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else ordered[half - 1] / 2 + ordered[half] / 2)


def doubling(values: Floats) -> float:
    """Return the steps in which a quantity doubles: ``1 / slope`` of the least-squares line through ``log2 x_t``.

    ``values`` (n,), oldest first; those that are not finite or not positive are left out. Infinite where it does not grow
    or fewer than three values are left.
    """
    with quiet_numpy():
        logs = np.log2(values)
    use = np.flatnonzero(np.isfinite(logs))
    if use.size < 3:
        return math.inf
    time = use - use.mean()
    slope = float((time * logs[use]).sum() / np.square(time).sum())
    return 1 / slope if slope > 0 else math.inf


@functools.lru_cache
def _triangle(k: int, rate: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the powers 0 to k of ``1 - rate``, and what each of k values adds to each of the k averages after it."""
    decays = (1.0 - rate) ** np.arange(k + 1)
    ages = np.subtract.outer(np.arange(k), np.arange(k))
    return decays, np.where(ages >= 0, rate * (1.0 - rate) ** np.maximum(ages, 0), 0.0)


class Typical:
    """The typical size of L positive quantities: an exponential moving average of their logarithms.

    ``b <- b + a_n * clamp(log x - b, -w, w)`` with ``a_n = max(1 / n, 1 - 0.5 ** (1 / half_life))``: a plain mean of the
    first logs, then an exponential average. The clamp ``w = log(4)`` (winsorising) lets one wild value move the average
    by at most ``a_n * w``, while a lasting change of level is followed in the end. Zero, NaN and Inf are left out.

    Attributes: ``value`` (L,) is ``exp(b)``, NaN before a layer's first value; ``scatter`` (L,) is the same average of
    ``min(|log x - b|, w)``; ``seen`` (L,) counts the values taken.
    """

    _WINSOR = math.log(4.0)

    def __init__(self, layers: int, half_life: float) -> None:
        self._log = np.full(layers, np.nan)
        self._rate = 1.0 - 0.5 ** (1.0 / half_life)
        self.seen = np.zeros(layers, dtype=np.int64)
        self.value = np.full(layers, np.nan)
        self.scatter = np.zeros(layers)

    def grow(self, layers: int) -> None:
        """Make room for layers that came later."""
        self._log = widened(self._log, layers, np.nan)
        self.seen = widened(self.seen, layers, 0)
        self.value = widened(self.value, layers, np.nan)
        self.scatter = widened(self.scatter, layers, 0)

    def update(self, x: Floats) -> None:
        """Take one value per layer; ``x`` has shape (L,). Call it under `quiet_numpy`: log of zero is no fault here."""
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
        """Take the values of ``rows`` (k, L), oldest first: the same as k times `update`, at the price of two or three.

        With a constant weight and nothing clamped, ``b_i = d b_(i-1) + (1 - d) log x_i`` is one triangular product.
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
        # where a step is clamped or missing, or a layer is young, the product goes wrong
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
        """Do what `update` does to one layer, value by value; return its mean and scatter."""
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
        """Plain lists, fit for any file."""
        return {"log": self._log.tolist(), "scatter": self.scatter.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Floats | list[float]]) -> None:
        """Restore what `state_dict` returned, perhaps as arrays; `gradwatch.history.saved` checks what comes from outside."""
        self._log = np.array(state["log"], dtype=np.float64)
        self.scatter = np.array(state["scatter"], dtype=np.float64)
        self.seen = np.array(state["seen"], dtype=np.int64)
        self.value = np.exp(self._log)
