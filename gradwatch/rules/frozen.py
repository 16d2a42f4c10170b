"""GW403: the weights never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import counted, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


_HELD = 6e-8  # of a float32 number: half the gap to the next one


class Frozen(Rule):
    """The weights never change although gradients arrive.

    ## What it means
    Not one bit of the layer has changed since watching began, although it is trainable and its gradient is not zero.

    ## Formula
    `value` is the number of steps since watching began, or since the layer became trainable at a learning rate above zero, if
    an exact fingerprint of its bits was the same at every sample; steps at which the layer had no gradient, or one of exactly
    zero, do not count. If instead the loss is stuck (at least 100 losses, improved by less than a tenth, and not from zero)
    and the update of every layer is too small for float32 (`u < 6e-8 ||w||`, with `u = lr ||g||` for SGD and `u = lr sqrt(n)`
    for Adam) even at the highest learning rate `lr` of the last 49 rows, `value` is the number of losses. If the learning
    rate of every group is 0, `value` is the number of steps since then. Otherwise it is `0`. It fires where `value > limit`
    (48), and resolves after as many steps without. Not considered are biases and gains (the gradient of a critic's last bias
    cancels), layers whose gradient is missing or exactly zero, and parameter groups at learning rate zero beside others that
    are not, because they wait to be unfrozen.

    ## Why it is bad
    The layer is not being trained, and nothing reports it: the optimizer holds another copy of the parameters or was built
    before they were replaced, its learning rate is zero, or its updates are smaller than the rounding error of a
    half-precision weight.

    ## What to do
    Build the optimizer from `model.parameters()` after the model is final. Check the learning rate of each parameter group
    and its schedule. Keep a float32 master copy of half-precision weights.

    ## When it is harmless
    A warm-up that starts with many steps at learning rate zero; a layer that you left out of the optimizer on purpose: set
    `requires_grad_(False)` on it.

    ## Source
    Updates lost to rounding: Micikevicius et al., "Mixed precision training" (2018), arXiv:1710.03740.
    """

    code: ClassVar[str] = "GW403"
    name: ClassVar[str] = "weights never change"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "frozen"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a stale optimizer", fires=49, unchanged="0+1x80"),
        Case("changes at step 30", fires=None, unchanged="0+1x30 0x60"),
        Case("the first gradients after a long while", fires=None, grad="0x80 1x20", unchanged="0+1x100"),
        Case("a head that is used now and then", fires=None, grad="1 nanx99 1", unchanged="0+1x101"),
        Case("updates lost to rounding", fires=99, grad="1e-9", loss="1x200"),
        Case("likewise, of a loss that began at zero", fires=None, grad="1e-9", loss="0x20 1e-15x200"),
        Case("zero gradient: nothing to learn from", fires=None, grad="0x80", unchanged="0+1x80"),
    )

    limit: float = Field(default=48.0, gt=0)
    keep_steps: int = Field(default=48, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the number of steps for which each layer has not changed since the start, shape (L,); else 0."""
        meant = (history.rate == 0) & (history.rate > 0).any()
        value = np.where(history.arriving & ~meant & history.matrices, history.unchanged, 0.0)
        if (value > self.limit).any():  # count steps with a gradient only: a sparse reward gives none for a long time
            for column in np.flatnonzero(value > self.limit).tolist():
                gradients = history.unchanged_by(column)
                if gradients is not None:  # otherwise no optimizer holds it, so its gradients are never measured
                    value[column] = min(value[column], gradients)
        if history.still_since is not None:
            value = np.where(history.matrices & (history.rate == 0), history.row.step - history.still_since, value)
        if self._update(history) is not None:
            value = np.where(history.matrices & (history.row.grad_norm > 0), history.losses, value)
        return value

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        if history.zero_rate_since is not None:
            step, exactly = history.zero_rate_since
            return {"still since": step, "exactly": exactly}
        update = self._update(history)
        lost = update is not None and history.losses == self.measure(history)[column]
        owned = history.facts.optimizer is not None and bool(np.isfinite(history.rate[column]))
        told = {"lost": lost, "owned": owned}
        if update is None or not lost:
            return told
        return told | {"update": update[column], "weight": history.weight[column]} | stuck_at(history)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        if "still since" in alarm.numbers:
            since = f"{alarm.numbers['still since']:.0f}" + ("" if alarm.numbers["exactly"] else " or before")
            return f"at step {alarm.step}, the learning rate of every group had been 0 since step {since}"
        if alarm.numbers["lost"]:
            update, weight = number(alarm.numbers["update"]), number(alarm.numbers["weight"])
            return (
                f"the update of {alarm.layer} was {update}, too small to change float32 weights of norm {weight} at step "
                f"{alarm.step}, likewise in every layer and in the steps before, and {in_words(alarm)}"
            )
        steps, limit = counted(alarm.value, "step"), number(alarm.limit)
        told = f"not one bit of {alarm.layer} changed in {steps}"
        if alarm.numbers["owned"]:
            return f"{told} with a gradient, until step {alarm.step} (limit {limit})"
        return f"{told}, until step {alarm.step} (limit {limit}): no optimizer that made a step holds it"

    def _update(self, history: History) -> Floats | None:
        """Return the size of each layer's update, shape (L,), if the loss is stuck and all are lost in float32; else None."""
        if history.row.family == "other" or not history.stuck:
            return None
        rates = history.learning_rate(last=int(self.limit) + 1)
        if not rates[-1] > 0:
            return None
        told = history.matrices & (history.row.grad_norm > 0)
        sgd = history.row.family == "sgd"
        update: Floats = history.rate * (history.row.grad_norm if sgd else np.sqrt(history.sizes))
        highest = update * np.fmax.reduce(rates) / rates[-1]  # the last steps of a schedule are often as short
        return update if told.any() and (highest[told] / history.weight[told] < _HELD).all() else None
