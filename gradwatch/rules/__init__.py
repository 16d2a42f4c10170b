"""The rules, one per file: each with its measure, its documentation, its validated limits and its cases.

To add a rule, add one file, its class here and what `CONTRIBUTING.md` lists.
"""

from __future__ import annotations

from difflib import get_close_matches

from gradwatch.errors import UsageError
from gradwatch.rules.at_chance import AtChance
from gradwatch.rules.base import Rule
from gradwatch.rules.buffer_nonfinite import BufferNonFinite
from gradwatch.rules.clip_bites import ClipBites
from gradwatch.rules.clip_never_bites import ClipNeverBites
from gradwatch.rules.dead import Dead
from gradwatch.rules.frozen import Frozen
from gradwatch.rules.gradient_nonfinite import GradientNonFinite
from gradwatch.rules.gradient_surge import GradientSurge
from gradwatch.rules.gradients_above_one import GradientsAboveOne
from gradwatch.rules.grows_backward import GrowsBackward
from gradwatch.rules.learning_lost import LearningLost
from gradwatch.rules.loss_jump import LossJump
from gradwatch.rules.loss_nonfinite import LossNonFinite
from gradwatch.rules.loss_runaway import LossRunaway
from gradwatch.rules.loss_stays_up import LossStaysUp
from gradwatch.rules.no_traction import NoTraction
from gradwatch.rules.opponent_won import OpponentWon
from gradwatch.rules.out_of_scale import OutOfScale
from gradwatch.rules.overwritten import Overwritten
from gradwatch.rules.step_overshoots import StepOvershoots
from gradwatch.rules.update_too_large import UpdateTooLarge
from gradwatch.rules.vanishing import Vanishing
from gradwatch.rules.weight_growth import WeightGrowth
from gradwatch.rules.weight_nonfinite import WeightNonFinite
from gradwatch.rules.weights_run_away import WeightsRunAway
from gradwatch.text.wording import in_a_row

_WORD = 3  # letters from which a part of a name says which rules may be meant
_MOST = 6  # rules that are named as those that may be meant

RULES: tuple[type[Rule], ...] = (
    NoTraction,
    LossJump,
    LossNonFinite,
    LossRunaway,
    LossStaysUp,
    LearningLost,
    WeightGrowth,
    WeightNonFinite,
    GradientsAboveOne,
    GradientSurge,
    GradientNonFinite,
    UpdateTooLarge,
    WeightsRunAway,
    StepOvershoots,
    GrowsBackward,
    BufferNonFinite,
    Vanishing,
    Dead,
    Frozen,
    OutOfScale,
    AtChance,
    Overwritten,
    OpponentWon,
    ClipBites,
    ClipNeverBites,
)


def default_rules() -> list[Rule]:
    """Return one instance of each rule with its default limits."""
    return [rule() for rule in RULES]


def rule_by_code(code: str) -> type[Rule]:
    """Return the rule class with this code or class name, in any case.

    Raises:
        UsageError: there is no such rule; the message names those that may be meant, or says how to list them.
    """
    known = {rule.code: rule for rule in RULES} | {rule.__name__: rule for rule in RULES}
    found = {name.lower(): rule for name, rule in known.items()}.get(code.lower())
    if found is None:
        meant = [f"{rule.code!r} ({rule.name})" for rule in _meant(code.lower())]
        meant = meant or [repr(word) for word in get_close_matches(code.lower(), ["verdict"])]
        listed = f" `gradwatch rules` lists the {len(RULES)} there are."
        raise UsageError(f"There is no rule {code!r}.{f' Did you mean {in_a_row(meant)}?' if meant else listed}")
    return found


def _meant(word: str) -> list[type[Rule]]:
    """Return the rules that a word may mean: of a code those that begin like it, else those named like it, else the nearest."""
    code = f"gw{word}" if word.isdecimal() else word
    if code.startswith("gw") and code[2:].isdecimal():  # another first digit is another group of rules
        group = [rule for rule in RULES if rule.code.lower().startswith(code[: len("gw3")])]
        return [rule for rule in group if rule.code.lower() == code] or group
    if len(word) >= _WORD:
        named = [rule for rule in RULES if word in rule.name.lower() or word in rule.__name__.lower()]
        if named:
            return named if len(named) <= _MOST else []
    by_name = {name.lower(): rule for rule in RULES for name in (rule.code, rule.__name__)}
    return [by_name[name] for name in get_close_matches(word, by_name, n=1, cutoff=0.6)]


__all__ = [
    "RULES",
    "AtChance",
    "BufferNonFinite",
    "ClipBites",
    "ClipNeverBites",
    "Dead",
    "Frozen",
    "GradientNonFinite",
    "GradientSurge",
    "GradientsAboveOne",
    "GrowsBackward",
    "LearningLost",
    "LossJump",
    "LossNonFinite",
    "LossRunaway",
    "LossStaysUp",
    "NoTraction",
    "OpponentWon",
    "OutOfScale",
    "Overwritten",
    "Rule",
    "StepOvershoots",
    "UpdateTooLarge",
    "Vanishing",
    "WeightGrowth",
    "WeightNonFinite",
    "WeightsRunAway",
    "default_rules",
    "rule_by_code",
]
