"""GW401: gradients vanish on their way back through the layers."""

from __future__ import annotations

import sys
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import in_words, stuck_at
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class Vanishing(Rule):
    """Gradients vanish on their way back through the layers.

    ## What it means
    A layer's gradient elements are orders of magnitude smaller than those of the layer with the largest ones, which is nearer
    to the loss. (In the other direction gradients grow: GW306.)

    ## Formula
    `value = max_k(rms_k) / rms_l`, with `rms_l = t_l / sqrt(n_l)`, `t_l` the typical gradient norm of layer `l` and `n_l`
    its number of elements. Where a single step from one layer to the next makes half of that ratio or more, measured in
    logarithms, the layers behind are a branch, and the largest `rms` of those farther from the loss takes the place of `rms_l`:
    what arrives there has passed by. It is 0 for the layer just behind one whose weights were all zero at first, such as those
    of a LoRA, which pass little back until they have grown. It fires where `value > limit` (1e6) for `for_steps` (32) steps.
    While the loss is stuck (at least 100 losses, improved by less than a tenth), `value` is multiplied by `stuck` (3,333), so
    that a ratio of 300 is enough; in a module beside the one that holds the largest, the ratio within the module has to be as
    large as well, since a second tower on the same loss, such as an actor beside its critic, has a scale of its own. Layers whose
    gradient is exactly zero belong to GW402. Biases and gains are not considered, because the gradient of a bias before a
    normalisation is mathematically zero.

    ## Why it is bad
    The layer hardly learns, while the layers after it adapt to its nearly unchanged output.

    ## What to do
    Use ReLU-like activations instead of sigmoid or tanh, He or Xavier initialisation, residual connections,
    normalisation, fewer layers; for recurrent models, use gated units.

    ## When it is harmless
    Layers that are hardly used by design, and a layer whose learning rate was set much higher on purpose.

    ## Source
    Hochreiter (1991); Bengio et al., "Learning long-term dependencies with gradient descent is difficult" (1994).
    """

    code: ClassVar[str] = "GW401"
    name: ClassVar[str] = "gradients vanish"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "vanishing"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("seven decades smaller", fires=39, grad={"first": "1e-9x60", "last": "1e-2x60"}),
        Case("three decades smaller", fires=None, grad={"first": "1e-5x60", "last": "1e-2x60"}),
        Case("all small together: converged", fires=None, grad={"first": "1e-12x60", "last": "1e-11x60"}),
    )

    limit: float = Field(default=1e6, gt=1)
    stuck: float = Field(default=1e4 / 3, ge=1)
    for_steps: int = Field(default=32, ge=1)
    keep_steps: int = Field(default=32, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the largest typical gradient element over that of each layer farther from the loss, shape (L,)."""
        rms = history.typical_elements()
        if not (rms > 0).any():
            return rms
        largest = int(np.nanargmax(rms))
        # a small gradient nearer to the loss than the largest has not vanished: from there on gradients grow
        value: Floats = np.where(history.order > history.order[largest], rms[largest] / _arrives(rms, history), np.nan)
        value[history.behind_zeros(rms > 0)] = 0.0
        if not history.stuck:
            return value
        beside = _shrinks_beside(rms, history, largest) * self.stuck <= self.limit
        return np.where(beside & ~(value > self.limit), 0.0, value * self.stuck)

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        rms = history.typical_elements()
        told = {"element": _arrives(rms, history)[column], "largest": np.fmax.reduce(rms), "stuck": history.stuck}
        return told | stuck_at(history)

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        element, largest = alarm.numbers["element"], alarm.numbers["largest"]
        stuck = bool(alarm.numbers["stuck"])
        # an average of logarithms may be smaller than any number
        times, limit = apart(largest / max(element, sys.float_info.min), alarm.limit / (self.stuck if stuck else 1))
        while_stuck = f", and {in_words(alarm)}" if stuck else ""
        return (
            f"the gradient of {alarm.layer} was usually {number(element)} per element by step {alarm.step}, {times} times "
            f"smaller than that of the layer with the largest ({number(largest)}; limit {limit}){while_stuck}"
        )


def _shrinks_beside(rms: Floats, history: History, largest: int) -> Floats:
    """Return the largest element of a layer's own module nearer to the loss, over that of the layer, shape (L,).

    Modules are the children of the model in which layers lie. Infinite in the module of the ``largest`` element, in one that
    holds a single matrix, and if the children are numbered, as in a chain.
    """
    paths = [name.split(".") for name in history.layers]
    depth = next(depth for depth in count() if len({tuple(path[: depth + 1]) for path in paths}) > 1 or len(paths) == 1)
    modules = np.array([".".join(path[: depth + 1]) for path in paths])
    shrinks = np.full(len(rms), np.inf)
    for module in set(modules.tolist()) - {modules[largest]}:
        mine = np.flatnonzero((modules == module) & (rms > 0))
        if len(mine) < 2 or module.rpartition(".")[2].isdecimal():
            continue
        chain = mine[np.argsort(history.order[mine])]
        shrinks[chain] = np.maximum.accumulate(rms[chain]) / rms[chain]
    return shrinks


def _arrives(rms: Floats, history: History) -> Floats:
    """Return the element of each layer, or the largest of those farther from the loss where it is one of a branch, shape (L,).

    A branch is entered in one step down: by half or more of the way from the largest element, measured in logarithms.
    """
    chain = np.argsort(history.order)
    chain = chain[rms[chain] > 0]
    elements = rms[chain]
    top = int(np.argmax(elements))
    steps = np.ones(len(elements))
    steps[top + 1 :] = elements[top:-1] / elements[top + 1 :]
    branch = np.maximum.accumulate(steps) ** 2 >= elements[top] / elements
    farther = np.maximum.accumulate(elements[::-1])[::-1]
    arriving: Floats = np.full(len(rms), np.nan)
    np.put(arriving, chain, np.where(branch, farther, elements))
    return arriving
