"""GW402: units or whole layers are dead."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Sign


_REST = 49  # rows after which a layer without a gradient no longer only rests


class Dead(Rule):
    """Units or whole layers are dead: their gradient is exactly zero.

    ## What it means
    A unit is a row of a weight matrix (an output of a linear layer, a channel of a convolution). It is dead when its
    gradient was exactly zero at each of the last four samples, each from another batch.

    ## Formula
    `value = dead units / units` of the layer, from the four samples, less `1 / sqrt(units)` but for the first layer: deep
    in a network at its start all inputs look alike to a unit, and it is on or off for all of them as a coin falls, so that
    two deviations of the share of heads are chance (told is the share less that); `1` where the layer's whole gradient norm is
    exactly zero on this step and was on each of the 48 before (a head that is used now and then rests; a layer without
    elements has none that could die). It fires where
    `value > limit` (0.5) for `for_steps` (16) steps. Only the weights of linear and convolutional layers have units; words
    that do not occur in an embedding are not dead. Nothing is, where the whole model's gradient is zero: the loss is at its
    floor. Where the loss has fallen to half of what it was, the incident is a notice.

    ## Why it is bad
    A dead unit never learns again: no data reach it, so nothing can bring it back.

    ## What to do
    Lower the learning rate (one large step is what usually kills ReLU units), use LeakyReLU or GELU, start biases at
    zero or slightly above, scale the inputs. If a whole layer is dead, look for a `detach()`, an `argmax`, or an output
    that the loss does not use.

    ## When it is harmless
    Experts that the router did not choose; a branch that is used later in training.

    ## Source
    Lu et al., "Dying ReLU and initialization" (2019), arXiv:1903.06733.
    """

    code: ClassVar[str] = "GW402"
    name: ClassVar[str] = "dead units"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "dead"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("a layer with zero gradient", fires=15, grad={"a": "0x40", "b": "1x40"}),
        Case("a loss at its floor", fires=None, grad="0x40"),
        Case("three of four units", fires=15, dead="0.75x40"),
        Case("one unit in five", fires=None, dead="0.2x40"),
        Case("zero now and then", fires=None, grad="0 1 0 1 0 1 0 1"),
    )

    limit: float = Field(default=0.5, gt=0, lt=1)
    for_steps: int = Field(default=16, ge=1)

    def measure(self, history: History) -> Floats:
        """Return the share of dead units of each layer, shape (L,)."""
        if history.row.global_norm == 0:  # the loss has no slope at all: it is at its floor
            return np.zeros(len(history.layers))
        by_chance = self._by_chance(history)
        if not (history.row.grad_norm == 0).any():
            return history.dead_share - by_chance
        silent = ~(history.grad_norm(last=_REST) > 0).any(axis=0) & (
            history.sizes > 0
        )  # without elements: nothing to die
        return np.where(history.row.grad_norm == 0, np.where(silent, 1.0, 0.0), history.dead_share - by_chance)

    @staticmethod
    def _by_chance(history: History) -> Floats:
        """Return the share above a half that chance alone makes dead, shape (L,); none in the first layer."""
        units = np.maximum(history.sizes / history.fan_in, 1)
        known = np.isfinite(history.dead_share)
        first = known & (history.order == np.max(history.order, where=known, initial=-1))
        return np.where(first, 0.0, 1 / np.sqrt(units))
