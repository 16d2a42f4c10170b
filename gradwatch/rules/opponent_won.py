"""GW407: of two optimizers whose losses oppose each other, one has won."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from gradwatch.history.gradient_norms import ABSENT
from gradwatch.history.optimizer_rows import rows_by_optimizer
from gradwatch.history.statistics import median_and_mad
from gradwatch.rules.base import Rule
from gradwatch.rules.notation import Case
from gradwatch.text.wording import apart, number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.history.history import History
    from gradwatch.history.optimizer_rows import OptimizerRows
    from gradwatch.records import Alarm, Floats, Kind, Sign

_LEVEL = 32  # newest losses whose median is the level of a loss
_REGRESSIONS = ("squared error", "smooth L1", "Huber")  # losses of a critic, whose actor may well end at a bound
_HIGHER = 0.1  # share of a loss by which it has to be higher


class OpponentWon(Rule):
    """Of two optimizers whose losses oppose each other, one has won: the other gets next to no gradient.

    ## What it means
    A generator and its discriminator take turns, and the loss of one runs through what the other trains. Where the other wins,
    that loss saturates: it is at its worst, and its gradient vanishes.

    ## Formula
    `value = min_l(T_l / m_l)` over the matrices that an optimizer holds, with `m_l` the largest gradient norm of layer `l` in
    that optimizer's last 49 rows, and `T_l` the largest that its typical norm (GW301) has been. It fires where `value > limit`
    (300), as long as the loss of that optimizer (the median of its last 32) is higher, by a tenth, than in the rows in which
    its typical norms were largest. It resolves once a gradient is back to a thirtieth, or the loss is no longer higher; gradients
    of exactly zero, which belong to GW402, do not resolve it. Only where two optimizers are seen to take turns so, and the first
    loss of the run is no regression, as that of a critic: its actor's gradient vanishes where the best action is at a bound.

    ## Why it is bad
    What gets no gradient does not learn: the winner has nothing more to learn from it either.

    ## What to do
    Use a loss that does not saturate, such as `-log D(G(z))` instead of `log(1 - D(G(z)))`, or the Wasserstein loss. Lower the
    learning rate of the winner, or let it make fewer steps.

    ## When it is harmless
    A game without random batches that has reached its equilibrium, where all gradients vanish; an actor whose best action is at
    a bound.

    ## Source
    Goodfellow et al., "Generative adversarial nets" (2014), section 3; Arjovsky and Bottou, "Towards principled methods for
    training generative adversarial networks" (2017), arXiv:1701.04862.
    """

    code: ClassVar[str] = "GW407"
    name: ClassVar[str] = "opponent has won"
    sign: ClassVar[Sign] = "silent"
    kind: ClassVar[Kind] = "vanishing"
    urgent: ClassVar[bool] = False
    cases: ClassVar[tuple[Case, ...]] = (
        Case("falls as the loss rises", fires=98, grad="1x50 1e-3x100", loss="0.5x50 0.9x100", opposed=True),
        Case("then exactly zero", fires=98, grad="1x50 1e-3x50 0x100", loss="0.5x50 0.9x150", opposed=True),
        Case("falls with the loss", fires=None, grad="1x50 1e-3x100", loss="0.5x50 1e-3x100", opposed=True),
        Case("at a loss as before", fires=None, grad="1x50 1e-3x100", loss="0.5", opposed=True),
        Case("a decade smaller", fires=None, grad="1x50 0.1x200", loss="0.5x50 0.9x200", opposed=True),
        Case(
            "one of two layers", fires=None, grad={"a": "1x150", "b": "1x50 1e-3x100"}, loss="0.5x50 0.9", opposed=True
        ),
        Case("no opponent", fires=None, grad="1x50 1e-3x100", loss="0.5x50 0.9x100"),
    )

    limit: float = Field(default=300.0, gt=1)
    release: float = Field(default=0.1, gt=0, le=1)
    keep_steps: int = Field(default=32, ge=0)

    def measure(self, history: History) -> Floats:
        """Return how many times smaller the gradients of all that a layer's optimizer holds are than they were, shape (L,)."""
        value = np.zeros(len(history.layers))
        if not history.opposed or history.facts.loss in _REGRESSIONS:
            return value
        for part in rows_by_optimizer(history, history.window):  # one that has lost may not even make steps
            mine, norms = _matrices(history, part), part.last(ABSENT)
            if mine.any() and len(norms) == ABSENT:
                largest, _ = history.largest_typical
                times = float((largest[mine] / np.fmax.reduce(norms[:, mine], axis=0)).min())
                now, then = _losses(history, part)
                if not math.isnan(times) and now - then > _HIGHER * abs(then):
                    value[mine] = times if math.isfinite(times) else self.limit  # zero only keeps it up
        return value

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers of the sentence; see `Rule.numbers`."""
        part = next(one for one in rows_by_optimizer(history, history.window) if one.held[column])
        now, then = _losses(history, part)
        norms, (largest, _) = part.last(ABSENT)[:, column], history.largest_typical
        return {"norm": np.fmax.reduce(norms), "largest": largest[column], "loss": now, "then": then}

    def sentence(self, alarm: Alarm) -> str:
        """Return what was seen; see `Rule.sentence`."""
        norm, largest, loss, then = (alarm.numbers[name] for name in ("norm", "largest", "loss", "then"))
        times, limit = apart(alarm.value, alarm.limit)
        return (
            f"by step {alarm.step} the gradient norm of {alarm.layer} had fallen from {number(largest)} to {number(norm)} or "
            f"less, and that of all that its optimizer holds at least {times}-fold (limit {limit}), while its loss rose from "
            f"{number(then)} to {number(loss)}"
        )


def _matrices(history: History, part: OptimizerRows) -> NDArray[np.bool_]:
    """Return the matrices that an optimizer holds, as far as their typical norm is known, shape (L,)."""
    told: NDArray[np.bool_] = part.held & history.matrices & np.isfinite(history.largest_typical[0])
    return told


def _losses(history: History, part: OptimizerRows) -> tuple[float, float]:
    """Return the level of an optimizer's loss, and what it was when its gradients were largest; NaN where it is not known."""
    now, _ = median_and_mad(part.losses[-_LEVEL:])
    then, _ = median_and_mad(history.largest_typical[1][_matrices(history, part)])
    return now, then


def rate_of_opponent(history: History, layer: str | None) -> float:
    """Return the learning rate of the one optimizer that takes turns with that of ``layer``; NaN if it is not known."""
    if layer not in history.layers:
        return math.nan
    column, rates = history.layers.index(layer), history.learning_rate()
    others = [part for part in rows_by_optimizer(history, history.window) if not part.held[column]]
    places = others[0].places if len(others) == 1 else None
    return math.nan if places is None else float(rates[places[-1]])
