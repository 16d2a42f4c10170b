"""What a rule is: frozen thresholds and one measured quantity. Time is not its business (see `gradwatch.verdict.alarms`)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gradwatch.settings import Settings

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Kind, Role, Sign
    from gradwatch.rules.notation import Case


class Rule(Settings):
    """One sign of instability: it fires where ``measure(history) > limit`` for ``for_steps`` steps in a row.

    It resolves after more than ``keep_steps`` steps at or below ``release * limit``.

    A rule of your own is a subclass with the class variables below, a `measure`, and a docstring under the fixed
    headings; pass an instance in ``attach(model, rules=[*gradwatch.default_rules(), MyRule()])``.

    Class variables:
        code, name: ``"GW203"`` and a short name in words.
        sign: what an alarm counts as in the verdict: subtle, confirming, growth, numeric or silent.
        kind: the incident kind that the alarm points to.
        per_layer: `measure` returns shape (L,) if True, else (1,).
        urgent: measured on each step once it stirs; one of the whole model that is not may wait up to 32 steps.
        opens: an alarm opens an incident. A confirming sign alone does not: it is a note.
        role: what the verdict takes an alarm for, beside its sign: a gradient far above its usual norm (surge), a loss that
            jumps (jump), an update that is known to be too long before it is made, for the weights (update) or for the loss
            (overshoot), weights that have been harmed (damage); empty: nothing more.
        remedy: advice that an alarm adds to its incident, with ``{suspect}`` for the prime suspect; empty: none.
        cases: written runs on which the rule must fire or stay quiet.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    sign: ClassVar[Sign]
    kind: ClassVar[Kind]
    per_layer: ClassVar[bool] = True
    urgent: ClassVar[bool] = True
    opens: ClassVar[bool] = True
    role: ClassVar[Role] = ""
    remedy: ClassVar[str] = ""
    cases: ClassVar[tuple[Case, ...]] = ()

    limit: float = Field(default=0.0)
    release: float = Field(default=1.0, gt=0, le=1)
    for_steps: int = Field(default=1, ge=1)
    keep_steps: int = Field(default=5, ge=0)

    def measure(self, history: History) -> Floats:
        """Return the quantity, shape (L,) or (1,); NaN where it cannot be told. Must not change the history."""
        raise NotImplementedError

    @classmethod
    def documentation(cls) -> str:
        """The rule's page, in Markdown: what `gradwatch explain` prints."""
        summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
        return f"# {cls.code} {cls.name}\n\n{summary}\n{rest}"
