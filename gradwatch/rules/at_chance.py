"""GW405: the loss stays at chance level, or above it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.rules.base import Rule
from gradwatch.rules.no_traction import gain_missing
from gradwatch.rules.notation import Case
from gradwatch.text.wording import number, percent

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Sign


class AtChance(Rule):
    """The loss stays at chance level, or above it.

    ## What it means
    For a long time, the loss has been that of a model that gives each class the same probability, or worse.

    ## Formula
    `value` is the smallest improvement that counts, divided by the improvement so far, as in GW101, where the median of the
    last `window` (50) losses is at least `(1 - near) ln(C)`, with `near` = 0.03 and `C` the number of predictions that a loss
    of cross-entropy compares, or else of units of the last matrix. The improvement is that on the reference loss (median of the
    first 16); if that was above `(1 + 2 near) ln(C)`, the one on the `window` losses up to 400 before the last counts, if it is
    less. Where losses are not known to be means of cross-entropies (what backward begins at is such a mean, or that times the
    loss scale), the median has to be within `near` of `ln(C)`, and the reference loss within twice as much. It is `0`
    elsewhere, before `min_steps` (200) losses and while the learning rate reached its highest value within the last 50 rows. It
    fires where `value > limit` (1.0) for `for_steps` (50) steps. A single output unit (a binary loss) has no such level.

    ## Why it is bad
    GW101 alone may be a plateau, or a loss that does not measure progress, as in reinforcement learning. A cross-entropy
    of `ln(C)` means that nothing at all has been learned.

    ## What to do
    Check that inputs and labels match (shuffled separately, sorted, off by one). Overfit one batch. Look for a `softmax`
    before a loss that applies its own, for a `detach()`, and for inputs that are all the same.

    ## When it is harmless
    Tasks with a long plateau before anything is learned, such as parity.

    ## Source
    Karpathy, "A recipe for training neural networks" (2019): verify the loss at initialisation, -log(1 / classes).
    """

    code: ClassVar[str] = "GW405"
    name: ClassVar[str] = "loss at chance level"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "stalled"
    remedy: ClassVar[str] = "Check that inputs and labels match, and that the loss receives logits, not probabilities."
    per_layer: ClassVar[bool] = False
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("ten classes, none learned", fires=248, loss="2.3x300"),
        Case("flat elsewhere", fires=None, loss="1.1x300"),
        Case("falls from chance", fires=None, loss="2.3+-0.002x400"),
    )

    limit: float = Field(default=1.0, gt=0)
    min_steps: int = Field(default=200, ge=20)
    window: int = Field(default=50, ge=5)
    near: float = Field(default=0.03, gt=0, lt=1)
    for_steps: int = Field(default=50, ge=1)
    keep_steps: int = Field(default=50, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the required improvement over the actual one, shape (1,); 0 away from chance level."""
        if history.losses < self.min_steps or history.resting or history.warming_up or not history.matrices.any():
            return np.zeros(1)
        chance, level = history.chance_loss, history.loss_level(self.window)[0]
        if not level >= (1 - self.near) * chance > 0:
            return np.zeros(1)
        far = history.reference_loss > (1 + 2 * self.near) * chance
        if history.guessing != chance:
            began = not far and history.reference_loss >= (1 - 2 * self.near) * chance
            return np.array(
                [gain_missing(history, self.window) if began and level <= (1 + self.near) * chance else 0.0]
            )
        return np.array([gain_missing(history, self.window, recent=far)])

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        return {
            "loss": history.loss_level(self.window)[0],
            "began": history.reference_loss,
            "classes": math.exp(history.chance_loss),
        }

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        loss, began, classes = (alarm.numbers[name] for name in ("loss", "began", "classes"))
        chance = math.log(classes)
        where = "above that" if loss > (1 + self.near) * chance else f"within {percent(self.near)}"
        same = abs(began - loss) <= 2 * self.near * chance
        then = f"as in its first 16 steps ({number(began)})" if same else f"{number(began)} in its first 16 steps"
        return (
            f"the loss was about {number(loss)} at step {alarm.step}, {where} of guessing among {classes:.0f} classes "
            f"(ln {classes:.0f} = {number(chance)}), {then}"
        )
