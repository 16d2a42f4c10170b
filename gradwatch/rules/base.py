"""The base class of rules: frozen limits and one measured quantity.

How long a condition must hold is decided by `gradwatch.verdict.alarms`, not by the rule.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gradwatch.settings import Settings

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Alarm, Floats, Kind, Role, Sign
    from gradwatch.rules.notation import Case


class Rule(Settings):
    """One sign of instability, which fires where ``measure(history) > limit`` for ``for_steps`` steps in a row.

    The alarm resolves after more than ``keep_steps`` steps at or below ``release * limit``.

    To write your own rule, subclass `Rule`, set the class attributes below, implement `measure` and document the rule under
    the fixed headings. Pass an instance: ``attach(model, rules=[*gradwatch.default_rules(), MyRule()])``. What an alarm says to
    people is its name, value and limit, unless you implement `sentence`, and `numbers` for what it needs beside these.

    Attributes:
        code: identifier such as ``"GW203"``.
        name: short name in words.
        sign: category of the alarm in the verdict: subtle, confirming, growth, numeric, silent or clip.
        kind: the incident kind that the alarm indicates.
        per_layer: True if `measure` returns shape (L,), False if it returns shape (1,).
        urgent: True if every step is judged while the rule is pending or firing. A whole-model rule that is not urgent may
            be measured as rarely as every 32 steps.
        opens: True if an alarm may open an incident. If False, it only joins one that another sign opens, and one of a clip is
            noted.
        role: additional meaning of an alarm in the verdict. ``"surge"``: the gradient norm is far above its usual value;
            ``"jump"``: the loss jumped; ``"level"``: it stays up since it jumped; ``"update"``: the coming update is too long for
            the weights; ``"overshoot"``: the coming update is too long for the loss; ``"damage"``: the weights have been
            harmed; ``"backward"``: gradients grow on the way back; ``"buffer"``: a buffer is not finite; ``""``: none.
        remedy: advice that an alarm adds to its incident, with ``{suspect}`` in place of the prime suspect; ``""``: none.
        cases: written runs on which the rule must fire or must stay quiet.
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
        """Return the measured quantity, shape (L,) or (1,), with NaN where it is unknown. Must not modify ``history``."""
        raise NotImplementedError

    def numbers(self, history: History, column: int) -> dict[str, float]:
        """Return the numbers that `sentence` needs beside value and limit, by name. Called when the rule begins to fire.

        Args:
            history: the history whose last row was just measured.
            column: column of the layer that fires; 0 for a rule about the whole model.
        """
        return {}

    def sentence(self, alarm: Alarm) -> str:
        """Return what an alarm of this rule saw, as a sentence in the past tense that names its step, value and limit.

        Args:
            alarm: an alarm that fires, with the result of `numbers`.
        """
        return alarm.sentence

    @classmethod
    def documentation(cls) -> str:
        """Return the rule's page in Markdown, as printed by ``gradwatch explain``."""
        summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
        return f"# {cls.code} {cls.name}\n\n{summary}\n{rest}"
