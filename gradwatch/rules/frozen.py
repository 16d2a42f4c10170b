"""GW403: weights that never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign


_HELD = 6e-8  # of a float32 number: half the gap to the next one


class Frozen(Rule):
    """The weights never change although gradients arrive.

    ## What it means
    Not one bit of the layer has changed since watching began, though it is trainable and its gradient is not zero.

    ## Formula
    `value = steps since watching began`, those without a gradient, or with one of exactly zero, not counted, where an exact
    fingerprint of the layer's bits was the same at every sample, or where the loss is stuck (100 steps and less than a tenth
    gained) and the update is, in each layer, too small for float32 to hold: `u < 6e-8 ||w||`, with `u = lr ||g||` for SGD and
    `lr sqrt(n)` for Adam; else `0`. It fires where `value > limit` (48). Left out are biases and gains (the gradient of a
    critic's last bias cancels), layers whose gradient is exactly zero or that got none, and parameter groups at rate zero
    beside others that are not: they wait to be unfrozen.

    ## Why it is bad
    The layer is not being trained, and nothing says so: the optimizer holds another copy of the parameters or was built
    before they were replaced, its learning rate is zero, or its updates are smaller than the rounding of a
    half-precision weight.

    ## What to do
    Build the optimizer after the model is final, from `model.parameters()`; look at the learning rate of each group and
    at its schedule; keep a float32 master copy of half-precision weights.

    ## When it is harmless
    A warm-up that starts with a long stretch at rate zero; a layer that you left out of the optimizer on purpose: say
    so with `requires_grad_(False)`.

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
        Case("zero gradient: nothing to learn from", fires=None, grad="0x80", unchanged="0+1x80"),
    )

    limit: float = Field(default=48.0, gt=0)

    def measure(self, history: History) -> Floats:
        """Return for how many steps each layer has not changed since the start, shape (L,)."""
        meant = (history.rate == 0) & (history.rate > 0).any()
        value = np.where(history.arriving & ~meant & history.matrices, history.unchanged, 0.0)
        if (value > self.limit).any():  # a reward may be long in coming: until then there is nothing to learn from
            norms = history.grad_norm()
            unowned = np.isnan(norms).all(axis=0)  # no optimizer steps it, so that its gradients are not measured
            value = np.where(unowned, value, np.minimum(value, np.count_nonzero(norms[:-1] > 0, axis=0)))
        if history.row.family != "other" and history.stuck:
            told = history.matrices & (history.row.grad_norm > 0)
            sgd = history.row.family == "sgd"
            update = history.rate * (history.row.grad_norm if sgd else np.sqrt(history.sizes)) / history.weight
            if told.any() and (update[told] < _HELD).all():
                value = np.where(told, history.losses, value)
        return value
