"""A notation for runs that shows in one line why a rule fires or stays quiet.

A series consists of words separated by blanks. ``0.1`` is one value, ``0.1x20`` the same value 20 times, ``1*2x5`` five
values that start at 1 and double, ``1+0.5x4`` four values that start at 1 and grow by 0.5. ``nan`` and ``inf`` are values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradwatch.history.history import History
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import Facts, NonFinite, Provenance, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gradwatch.records import Floats

_WORD = re.compile(
    r"(?P<start>nan|[-+]?inf|[-+]?[\d.]+(?:e[-+]?\d+)?)(?:(?P<way>[*+])(?P<by>[-\d.e]+))?(?:x(?P<count>\d+))?"
)

_OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "other": "another"}


def series(text: str) -> list[float]:
    """Return the values of a written series.

    Raises:
        ValueError: a word does not follow the notation.

    >>> series("0.5x2 1*10x3 nan")
    [0.5, 0.5, 1.0, 10.0, 100.0, nan]
    """
    values: list[float] = []
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r} is not a series: write 0.1, 0.1x20, 1*2x5 or 1+0.5x4.")
        start, by = float(match["start"]), float(match["by"] or 0)
        steps = range(int(match["count"] or 1))
        with ignore_fp_warnings():  # growth may overflow to infinity
            values.extend(
                start * float(np.float64(by) ** n) if match["way"] == "*" else start + by * n if match["way"] else start
                for n in steps
            )
    return values


@dataclass(frozen=True)
class Case:
    """A written run and the step at which a rule must fire on it.

    Args:
        name: what the run shows, in words.
        fires: step at which the rule fires first; None: it never fires.
        grad, weight, dead, unchanged: gradient norms, weight norms, shares of dead units and numbers of unchanged steps;
            one series for all layers, or a mapping from layer names to series. A short series repeats its last value.
        loss: series of losses.
        clip: series of the factors that the user's own clip put on the norm; empty: no clip.
        rate: learning rate, or a series of them.
        family: optimizer family.
        size: number of elements of each layer.
        buffers: series of 1 where all buffers are finite, and 0 where one is not.
        opposed: whether the losses of two optimizers oppose each other.
        loss_of: kind of the loss, such as "cross-entropy", a mean that backward begins at; "" if it is not known.
    """

    name: str
    fires: int | None
    grad: str | Mapping[str, str] = "1.0"
    loss: str = "1.0"
    weight: str | Mapping[str, str] = "1.0"
    dead: str | Mapping[str, str] = "0"
    unchanged: str | Mapping[str, str] = "0"
    clip: str = ""
    rate: float | str = 0.01
    family: Literal["sgd", "adam", "other"] = "sgd"
    size: int = 100
    buffers: str = "1"
    opposed: bool = False
    loss_of: str = ""

    def rows(self) -> tuple[History, Iterator[Row]]:
        """Return an empty history and an iterator over the rows to push into it."""
        named = [text for text in (self.grad, self.weight, self.dead, self.unchanged) if not isinstance(text, str)]
        layers = tuple(named[0]) if named else ("layer",)
        columns = {
            word: [series(text if isinstance(text, str) else text[layer]) for layer in layers]
            for word, text in (
                ("grad", self.grad),
                ("weight", self.weight),
                ("dead", self.dead),
                ("unchanged", self.unchanged),
            )
        }
        losses, left, well = series(self.loss), series(self.clip), series(self.buffers)
        rates = series(self.rate) if isinstance(self.rate, str) else [self.rate]
        steps = max(
            len(losses),
            len(left),
            len(rates),
            len(well),
            *(len(values) for columns_ in columns.values() for values in columns_),
        )
        history = History(layers, sizes=[self.size] * len(layers))
        history.know(
            Facts(
                optimizer=_OPTIMIZERS[self.family],
                family=self.family,
                opposed_since=0 if self.opposed else None,
                loss=self.loss_of,
                behind="nothing" if self.loss_of else "more",
                mean=bool(self.loss_of),
            )
        )

        def written() -> Iterator[Row]:
            for step in range(steps):
                now = {
                    word: np.array([values[min(step, len(values) - 1)] for values in layered])
                    for word, layered in columns.items()
                }
                applied = left[min(step, len(left) - 1)] if left else math.nan
                now["rate"] = np.full(len(layers), rates[min(step, len(rates) - 1)])
                row = _row(step, losses[min(step, len(losses) - 1)], now, applied, self)
                yield row._replace(buffers_well=well[min(step, len(well) - 1)] > 0)

        return history, written()


def _row(step: int, loss: float, now: dict[str, Floats], applied: float, case: Case) -> Row:
    grad, weight = now["grad"], now["weight"]
    codes = np.where(np.isnan(grad), NonFinite.NAN, np.where(np.isinf(grad), NonFinite.INF, 0)).astype(np.uint8)
    return Row(
        step=step,
        loss=loss,
        grad_norm=grad,
        global_norm=math.hypot(*grad.tolist()) if np.isfinite(grad).all() else math.nan,
        weight_norm=weight,
        nonfinite=codes if codes.any() else None,
        poisoned=bool(codes.any()),
        family=case.family,
        nonfinite_weight=~np.isfinite(weight),
        rate=now["rate"],
        dead_share=now["dead"],
        unchanged=now["unchanged"],
        applied=1.0 if math.isnan(applied) else applied,
        provenance=Provenance(
            "written",
            "as the optimizer sees it" if math.isnan(applied) else "before the user's clip",
            "backward root" if case.loss_of else "written",
        ),
    )
