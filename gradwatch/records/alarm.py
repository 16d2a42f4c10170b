"""`Alarm`: a rule begins or ceases to fire."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gradwatch.records.kinds import Kind, Sign  # noqa: TC001  pydantic reads the annotations
from gradwatch.text.printable import printable
from gradwatch.text.wording import apart


@dataclass(frozen=True, slots=True, repr=False)
class Alarm:
    """A change of state of one rule on one layer.

    Attributes:
        code, name, sign, kind: those of the rule.
        layer: name of the layer; None: the whole model.
        step: step of the change.
        value: quantity that the rule computed.
        limit: limit of the rule.
        state: whether the rule began or ceased to fire.
        words: what the rule saw, as a sentence of its own; ``""``: it has none, or it is not known (see `sentence`).
        numbers: the measured numbers that stand in ``words``, by name.
    """

    code: str
    name: str
    sign: Sign
    kind: Kind
    layer: str | None
    step: int
    value: float
    limit: float
    state: Literal["firing", "resolved"] = "firing"
    words: str = ""
    numbers: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def sentence(self) -> str:
        """What was seen: ``words``, or the name of the rule with value and limit where there are none."""
        if self.words:
            return self.words
        where = f" in {self.layer}" if self.layer else ""
        if self.state == "resolved":
            return f"{self.name}{where}: over at step {self.step}"
        if not self.limit > 0 or not math.isfinite(self.value):  # a yes or no, or a measure beyond every limit
            return f"{self.name}{where} at step {self.step}"
        value, limit = apart(self.value, self.limit)
        return f"{self.name}{where} at step {self.step}: measured {value}, above its limit of {limit}"

    def __repr__(self) -> str:
        return f"<Alarm {self}, {self.state}>"

    def __str__(self) -> str:
        return printable(f"{self.sentence} ({self.code})")
