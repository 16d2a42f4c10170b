"""The rules, one per file: each with its measure, its documentation, its validated limits and its cases.

To add a rule, add one file, its class here and what `CONTRIBUTING.md` lists.
"""

from __future__ import annotations

from gradwatch.errors import UsageError, did_you_mean
from gradwatch.rules.at_chance import AtChance
from gradwatch.rules.base import Rule
from gradwatch.rules.clip_bites import ClipBites
from gradwatch.rules.clip_never_bites import ClipNeverBites
from gradwatch.rules.dead import Dead
from gradwatch.rules.frozen import Frozen
from gradwatch.rules.gradient_nonfinite import GradientNonFinite
from gradwatch.rules.gradient_surge import GradientSurge
from gradwatch.rules.gradients_above_one import GradientsAboveOne
from gradwatch.rules.grows_backward import GrowsBackward
from gradwatch.rules.loss_jump import LossJump
from gradwatch.rules.loss_nonfinite import LossNonFinite
from gradwatch.rules.loss_runaway import LossRunaway
from gradwatch.rules.no_traction import NoTraction
from gradwatch.rules.out_of_scale import OutOfScale
from gradwatch.rules.overwritten import Overwritten
from gradwatch.rules.step_overshoots import StepOvershoots
from gradwatch.rules.update_too_large import UpdateTooLarge
from gradwatch.rules.vanishing import Vanishing
from gradwatch.rules.weight_growth import WeightGrowth
from gradwatch.rules.weight_nonfinite import WeightNonFinite
from gradwatch.rules.weights_run_away import WeightsRunAway

RULES: tuple[type[Rule], ...] = (
    NoTraction,
    LossJump,
    LossNonFinite,
    LossRunaway,
    WeightGrowth,
    WeightNonFinite,
    GradientsAboveOne,
    GradientSurge,
    GradientNonFinite,
    UpdateTooLarge,
    WeightsRunAway,
    StepOvershoots,
    GrowsBackward,
    Vanishing,
    Dead,
    Frozen,
    OutOfScale,
    AtChance,
    Overwritten,
    ClipBites,
    ClipNeverBites,
)


def default_rules() -> list[Rule]:
    """Return one instance of each rule with its default limits."""
    return [rule() for rule in RULES]


def rule_by_code(code: str) -> type[Rule]:
    """Return the rule class with this code or class name, in any case.

    Raises:
        UsageError: there is no such rule; the message names the nearest one.
    """
    known = {rule.code: rule for rule in RULES} | {rule.__name__: rule for rule in RULES}
    found = {name.lower(): rule for name, rule in known.items()}.get(code.lower())
    if found is None:
        raise UsageError(f"There is no rule {code!r}.{did_you_mean(code.upper(), [r.code for r in RULES])}")
    return found


__all__ = [
    "RULES",
    "AtChance",
    "ClipBites",
    "ClipNeverBites",
    "Dead",
    "Frozen",
    "GradientNonFinite",
    "GradientSurge",
    "GradientsAboveOne",
    "GrowsBackward",
    "LossJump",
    "LossNonFinite",
    "LossRunaway",
    "NoTraction",
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
