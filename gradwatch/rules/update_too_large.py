"""GW303: the update is too large for the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.losses import EARLY
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign

RATE_SIZED = {"Adam", "AdamW", "NAdam", "Adamax", "RMSprop"}  # each element moves by about the learning rate


class UpdateTooLarge(Rule):
    """The update is too large for the weights.

    ## What it means
    One optimizer step changes a layer by more than the size of its weights. The rule needs no history, so it works from the
    first step.

    ## Formula
    `value = ||dw|| / max(||w||, 0.5 * sqrt(n / f))` for matrices with `n >= 16` elements and `f` inputs; the floor is half
    of a usual initialisation, for layers that start at zero. For SGD the update is known in advance: `||dw|| = lr * c * ||g||`,
    with learning rate `lr` and the factor `c` of the user's own clipping (momentum adds to it and is not considered). Adam,
    AdamW, NAdam, Adamax and RMSprop change each element by about the learning rate or more in their first steps. There half
    of `lr sqrt(n)` is used, because healthy runs tolerate such an update as large as the weights. For all optimizers but SGD
    a lower bound is measured: `||dw|| >= | ||w_t|| - ||w_{t-k}|| | / k` over the `k` steps between two samples of the weight
    norm. It fires where `value > limit` (1.0) and resolves below `release * limit` (0.5); healthy values are 1e-4 to 1e-1.
    Biases, gains and optimizers with a line search are not considered.

    ## Why it is bad
    A single batch overwrites what the layer had learned.

    ## What to do
    SGD: clip by norm, or lower the learning rate until the value is below 0.1. Adam and similar optimizers: lower the
    learning rate or warm it up; clipping does not help, because they divide the gradient by its own size.

    ## When it is harmless
    Layers that were initialised almost at zero, in their first steps.

    ## Source
    The ratio of updates to weights: Karpathy, CS231n notes, "Ratio of weights:updates". Mean update over mean weight
    above 1 detects 13 of 13 explosions and fires in no healthy run of a pilot study, which is not part of the repository.
    """

    code: ClassVar[str] = "GW303"
    name: ClassVar[str] = "update too large for the weights"
    sign: ClassVar[Sign] = "growth"
    kind: ClassVar[Kind] = "exploding"
    role: ClassVar[Role] = "update"
    cases: ClassVar[tuple[Case, ...]] = (
        Case("SGD, before the first update", fires=0, grad="500x3", weight="2x3"),
        Case("SGD, healthy", fires=None, grad="5x100", weight="2x100"),
        Case("Adam, measured afterwards", fires=2, weight="2 2.1 20", family="adam"),
        Case("Adam, a rate beyond the weights", fires=0, weight="5x5", rate=1.2, family="adam"),
        Case(
            "Adam: a large gradient is no large update", fires=None, grad="500x50", weight="2*1.001x50", family="adam"
        ),
    )

    limit: float = Field(default=1.0, gt=0)
    release: float = Field(default=0.5, gt=0, le=1)

    def measure(self, history: History) -> Floats:
        """Return the norm of the update over the norm of the weights for each matrix, shape (L,); NaN for other layers."""
        floor = history.half_usual
        if history.row.family == "other":  # the step length of a line search is unknown
            return np.full(len(history.layers), np.nan)
        if history.row.family == "sgd":
            ratio = history.rate * history.row.applied * history.row.grad_norm / np.maximum(history.weight, floor)
        else:
            moved = np.abs(history.weight - history.previous_weight) / history.weight_gap
            ratio = moved / np.maximum(history.previous_weight, floor)
            if history.losses <= EARLY and history.facts.optimizer in RATE_SIZED:
                meant = history.rate * np.sqrt(history.sizes) / np.maximum(history.weight, floor)
                ratio = np.fmax(ratio, meant / 2)
        return np.where(history.large_matrices, ratio, np.nan)

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        sgd = history.row.family == "sgd"
        moved = abs(history.weight[column] - history.previous_weight[column]) / history.weight_gap
        told = {"weight": (history.weight if sgd else history.previous_weight)[column], "update": moved, "by rate": 0.0}
        if sgd:
            told["update"] = history.rate[column] * history.row.applied * history.row.grad_norm[column]
        told["floor"] = history.half_usual[column]
        if not sgd and not moved > self.limit * max(told["weight"], told["floor"]):
            told |= {"weight": history.weight[column], "by rate": 1.0}
            told["update"] = history.rate[column] * math.sqrt(history.sizes[column])
        return told | {"due": sgd, "rate": history.rate[column]}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        update, weight, floor = (alarm.numbers[name] for name in ("update", "weight", "floor"))
        limit, base, size = alarm.limit, "the norm of its weights", number(update)
        if alarm.numbers["due"]:
            told = f"the update due for {alarm.layer} at step {alarm.step} was {size} long"
        elif alarm.numbers["by rate"]:  # half of this is compared with the limit
            rate, limit = number(alarm.numbers["rate"]), 2 * limit
            told = f"the learning rate of {rate} was to move {alarm.layer} by about {size} at step {alarm.step}"
        else:
            told, base = (
                f"the weight norm of {alarm.layer} changed by {size} a step up to step {alarm.step}",
                "what it was",
            )
        if not math.isfinite(update):
            return told
        times, most = apart(update / max(floor, weight), limit)
        base = base if weight >= floor else "half of a usual initialisation"
        return f"{told}, {times} times {base} ({number(max(floor, weight))}; limit {most})"
