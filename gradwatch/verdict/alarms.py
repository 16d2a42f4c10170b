"""The state of alarms: pending -> firing -> resolved, as arrays of counters.

A rule's condition must hold for ``for_steps`` steps before its alarm fires. The alarm resolves after the value was at
or below ``release * limit`` for more than ``keep_steps`` steps. Each step is one update of (rules, layers) arrays; an `Alarm`
is created only when a state changes.
"""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.history.columns import widened
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import Alarm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.records import Floats
    from gradwatch.rules.base import Rule


_BITS = 52  # bits of an integer that float64 holds exactly


def _bit(index: int) -> int:
    """Return the bit of a rule. Rules beyond the number of bits share the last one."""
    return 1 << min(index, _BITS - 1)


class Alarms:
    """The state of ``R`` rules on ``L`` layers. A whole-model rule uses column 0.

    In distributed training, a rule of the user's own may fail in a single process. Its values are therefore used ``lag`` rows
    later, when all processes know whether it failed anywhere.

    Args:
        rules: the R rules.
        layers: names of the L layers.
        on_error: called with the name of a rule that raised and the exception; the rule is then switched off. If None, the
            exception is raised.

    Attributes:
        values: last value of each rule, shape (R, L).
        firing: whether each alarm fires, shape (R, L).
        stirring: True while every step must be judged, because an urgent or per-layer rule is pending or an urgent one fires.
            A pending, non-urgent whole-model rule does not force every step to be judged. A per-layer rule does: otherwise
            branches that alternate would be sampled only while idle.
        lag: number of rows after which each process knows which rules failed in the others; 0: there are no others.
        failed: the rules that failed in this process, one bit each.
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
        self._speechless = [False] * len(self.rules)
        self._own = [not type(rule).__module__.startswith("gradwatch.rules.") for rule in self.rules]
        self._waiting: dict[int, deque[Any]] = {}
        self._measured_at = -1
        self.lag = 0
        self.failed = 0
        self.stirring = False

    def follow_peers(self, lag: int) -> None:
        """Let the values of the user's own rules wait ``lag`` rows for what other processes say; 0: no more."""
        self.lag = lag

    @property
    def waiting(self) -> bool:
        """True while values wait for other processes, so that every process must judge every row."""
        return self.lag > 0 and any(map(operator.and_, self._own, self._alive))

    def switch_off(self, failed: int) -> list[str]:
        """Switch off the rules that failed in any process, given as bits.

        Returns:
            The code and name of each rule that is switched off now and did not fail in this process.
        """
        off = [index for index in range(len(self.rules)) if failed & _bit(index)]
        news = [index for index in off if self._alive[index] and not self.failed & _bit(index)]
        for index in off:
            self._alive[index] = False
            self.values[index] = np.nan
        return [f"{self.rules[index].code} {self.rules[index].name}" for index in news]

    def grow(self, layers: Sequence[str]) -> None:
        """Extend the state to ``layers``, to which columns were added."""
        self._waiting.clear()
        self.layers = tuple(layers)
        self.values = widened(self.values, len(self.layers), np.nan)
        for name in ("firing", "_held", "_calm"):
            setattr(self, name, widened(getattr(self, name), len(self.layers), 0))

    def update(self, history: History, step: int) -> list[Alarm]:
        """Measure every rule on the last row of ``history`` and return the alarms that changed state, in rule order."""
        for index, rule in enumerate(self.rules):
            if self._alive[index]:
                self._measure(index, rule, history)
        elapsed = max(1, step - self._measured_at)
        self._measured_at = step
        over = self.values > self.limits
        if not over.any() and not self._held.any() and not self.firing.any():
            self.stirring = False
            return []
        # what is new counts for this step only; what held before counts for the steps since then too
        self._held = np.where(over, np.where(self._held > 0, self._held + elapsed, 1), 0)
        self._calm = np.where(self.values > self._release, 0, np.where(self._calm > 0, self._calm + elapsed, 1))
        firing = (self.firing & (self._calm <= self._keep_steps)) | (self._held >= self._for_steps)
        changed = firing != self.firing
        self.firing = firing
        pending = (self._held > 0) & ~firing
        self.stirring = bool(pending[self._impatient].any() or firing[self._urgent].any())
        if not changed.any():
            return []
        return [self._alarm(int(index), int(column), step, history) for index, column in np.argwhere(changed)]

    def _measure(self, index: int, rule: Rule, history: History) -> None:
        try:
            value = self._value(index, rule, history)
            if rule.per_layer:
                self.values[index] = value
            else:
                self.values[index, 0] = value[0]
        except Exception as error:
            if self._on_error is None:
                raise
            self.failed |= _bit(index)
            if self.lag and self._own[index]:  # earlier values still count in the other processes
                self.values[index] = self._in_turn(index, np.full(self.values.shape[1], np.nan))
            else:
                self._alive[index] = False
                self.values[index] = np.nan
            self._on_error(f"rule {rule.code} {rule.name}", error)

    def _value(self, index: int, rule: Rule, history: History) -> Any:
        if not self.lag or not self._own[index]:
            return rule.measure(history)
        nothing = np.full(self.values.shape[1], np.nan)
        if self.failed & _bit(index):
            return self._in_turn(index, nothing)
        nothing[: None if rule.per_layer else 1] = rule.measure(history)
        return self._in_turn(index, nothing)

    def _in_turn(self, index: int, value: Floats) -> Floats:
        """Store ``value`` and return the value of ``lag`` rows ago."""
        queue = self._waiting.setdefault(index, deque([np.full_like(value, np.nan)] * self.lag))
        queue.append(value)
        past: Floats = queue.popleft()
        return past

    def _alarm(self, index: int, column: int, step: int, history: History) -> Alarm:
        rule = self.rules[index]
        alarm = Alarm(
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
        # a value that waited for other processes belongs to an earlier row than the numbers would
        return alarm if self.lag and self._own[index] else self._in_words(index, alarm, column, history)

    def _in_words(self, index: int, alarm: Alarm, column: int, history: History) -> Alarm:
        """Return an alarm that fires with the rule's numbers and its sentence; without, if the rule cannot say it."""
        if alarm.state == "resolved" or self._speechless[index]:
            return alarm
        rule = self.rules[index]
        try:
            known = {name: float(value) for name, value in rule.numbers(history, column).items()}
            words = "" + rule.sentence(replace(alarm, numbers=known))  # raises for what is no text
        except Exception as error:
            if self._on_error is None:
                raise
            self._speechless[index] = True
            self._on_error(f"the sentence of rule {rule.code} {rule.name}", error)
            return alarm
        return replace(alarm, words=words, numbers=known)

    def firing_rules(self) -> tuple[str, ...]:
        """Return the rules that fire now, such as ``"GW203 gradients above 1.0 in each layer"``."""
        return tuple(f"{self.rules[i].code} {self.rules[i].name}" for i in np.flatnonzero(self.firing.any(axis=1)))

    def closeness(self) -> tuple[Floats, NDArray[np.intp]]:
        """Return the largest ratio of value to limit of each layer, and the index of its rule, both of shape (L,).

        The ratio of a rule with limit 0 is infinite if its value is positive, and minus infinity otherwise. The ratio of a
        layer for which no per-layer rule has a value is minus infinity.
        """
        if not self.rules:
            return np.full(len(self.layers), -np.inf), np.zeros(len(self.layers), dtype=np.intp)
        per_layer = np.array([rule.per_layer for rule in self.rules], dtype=bool)[:, None]
        with ignore_fp_warnings():
            ratio = np.where(self.limits > 0, self.values / self.limits, np.where(self.values > 0, np.inf, -np.inf))
        ratio = np.where(per_layer & ~np.isnan(ratio), ratio, -np.inf)
        return ratio.max(axis=0), ratio.argmax(axis=0)
