"""The only file where time enters: pending -> firing -> resolved, as arrays of counters.

A rule's condition must hold for ``for_steps`` steps before its alarm fires; the alarm resolves after the value was at
or below ``release * limit`` for more than ``keep_steps`` steps. Everything is one (rules, layers) update; an `Alarm` is
made only when a state changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.columns import widened
from gradwatch.records import Alarm
from gradwatch.statistics import quiet_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from gradwatch.history import History
    from gradwatch.records import Floats
    from gradwatch.rules.base import Rule


class Alarms:
    """State of ``R`` rules on ``L`` layers. ``values`` and ``firing`` have shape (R, L).

    ``stirring`` is True while a rule is pending or an urgent one fires: then no step may go unjudged. A rule about the
    whole model that is not urgent may pend unseen: the loss's medians do not change from step to step. One about single
    layers may not, or parts of a model that take turns would be seen only at rest.

    A rule about the whole model uses column 0. ``on_error`` is told of a rule that raised; the rule is switched off.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        layers: Sequence[str],
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.layers = tuple(layers)
        self._on_error = on_error
        shape = (len(self.rules), max(1, len(self.layers)))
        self.values = np.full(shape, np.nan)
        self.firing = np.zeros(shape, dtype=bool)
        self.limits = np.array([rule.limit for rule in self.rules])[:, None]
        self._release = self.limits * np.array([rule.release for rule in self.rules])[:, None]
        self._held = np.zeros(shape, dtype=np.int64)
        self._calm = np.zeros(shape, dtype=np.int64)
        self._for_steps = np.array([rule.for_steps for rule in self.rules])[:, None]
        self._keep_steps = np.array([rule.keep_steps for rule in self.rules])[:, None]
        self._urgent = np.array([rule.urgent for rule in self.rules], dtype=bool)
        self._impatient = np.array([rule.urgent or rule.per_layer for rule in self.rules], dtype=bool)
        self._alive = [True] * len(self.rules)
        self._measured_at = -1
        self.stirring = False

    def grow(self, layers: Sequence[str]) -> None:
        """Take the columns of layers that were added."""
        self.layers = tuple(layers)
        self.values = widened(self.values, len(self.layers), np.nan)
        for name in ("firing", "_held", "_calm"):
            setattr(self, name, widened(getattr(self, name), len(self.layers), 0))

    def update(self, history: History, step: int) -> list[Alarm]:
        """Measure every rule on the last row and return the alarms that changed state, in rule order."""
        for index, rule in enumerate(self.rules):
            if self._alive[index]:
                self._measure(index, rule, history)
        elapsed = max(1, step - self._measured_at)
        self._measured_at = step
        over = self.values > self.limits
        if not over.any() and not self._held.any() and not self.firing.any():
            self.stirring = False
            return []
        # a condition seen now is known to hold for this step only; one seen before, for the steps between as well
        self._held = np.where(over, np.where(self._held > 0, self._held + elapsed, 1), 0)
        self._calm = np.where(self.values > self._release, 0, self._calm + elapsed)
        firing = (self.firing & (self._calm <= self._keep_steps)) | (self._held >= self._for_steps)
        changed = firing != self.firing
        self.firing = firing
        pending = (self._held > 0) & ~firing
        self.stirring = bool(pending[self._impatient].any() or firing[self._urgent].any())
        if not changed.any():
            return []
        return [self._alarm(int(index), int(column), step) for index, column in np.argwhere(changed)]

    def _measure(self, index: int, rule: Rule, history: History) -> None:
        try:
            value = rule.measure(history)
            if rule.per_layer:
                self.values[index] = value
            else:
                self.values[index, 0] = value[0]
        except Exception as error:
            if self._on_error is None:
                raise
            self._alive[index] = False
            self.values[index] = np.nan
            self._on_error(f"rule {rule.code} {rule.name}", error)

    def _alarm(self, index: int, column: int, step: int) -> Alarm:
        rule = self.rules[index]
        return Alarm(
            code=rule.code,
            name=rule.name,
            sign=rule.sign,
            kind=rule.kind,
            layer=self.layers[column] if rule.per_layer else None,
            step=step,
            value=float(self.values[index, column]),
            limit=rule.limit,
            state="firing" if self.firing[index, column] else "resolved",
        )

    def firing_rules(self) -> tuple[str, ...]:
        """The rules that fire now, as ``"GW203 gradients above 1.0 in each layer"``."""
        return tuple(f"{self.rules[i].code} {self.rules[i].name}" for i in np.flatnonzero(self.firing.any(axis=1)))

    def closeness(self) -> tuple[Floats, NDArray[np.intp]]:
        """Each layer's largest value / limit, shape (L,), and the index of the rule it belongs to, shape (L,).

        A rule with limit 0 either fires (infinitely close) or has nothing to say. Minus infinity: no rule can tell.
        """
        if not self.rules:
            return np.full(len(self.layers), -np.inf), np.zeros(len(self.layers), dtype=np.intp)
        per_layer = np.array([rule.per_layer for rule in self.rules], dtype=bool)[:, None]
        with quiet_numpy():
            ratio = np.where(self.limits > 0, self.values / self.limits, np.where(self.values > 0, np.inf, -np.inf))
        ratio = np.where(per_layer & ~np.isnan(ratio), ratio, -np.inf)
        return ratio.max(axis=0), ratio.argmax(axis=0)
