"""Comparison of the settings of two runs: learning rate, optimizer, batch, model, auto-clip, rules and versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.offline.policy import differences
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from gradwatch.records import Floats
    from gradwatch.runlog import RunLog
    from gradwatch.runlog.session import Series

UNKNOWN = "not known"
_CLIP = "auto-clip"
_OF_OPTIMIZER = " of the optimizer"


@dataclass(frozen=True)
class Setting:
    """One setting of two runs, in words.

    Attributes:
        name: name of the setting.
        left, right: what it is in either run; ``"not known"`` if its log does not say.
        from_step: first common step at which it differs, for settings that are known at each step; None for others.
    """

    name: str
    left: str
    right: str
    from_step: int | None = None

    @property
    def differs(self) -> bool:
        """True if the runs differ in it, or one of them does not say."""
        return self.left != self.right or self.from_step is not None

    @property
    def known(self) -> bool:
        """True if at least one run says what it is."""
        return (self.left, self.right) != (UNKNOWN, UNKNOWN)


def settings_of(left: RunLog, right: RunLog) -> list[Setting]:
    """Return the settings of two runs: those of their last sessions, and the learning rate and loss scale of all steps."""
    a, b = left.series(), right.series()
    of_each = _of_session(left), _of_session(right)
    return [
        _of_steps("learning rate", a, b, (a.learning_rate, b.learning_rate), UNKNOWN),
        _of_steps("loss scale", a, b, (a.loss_scale, b.loss_scale), "none"),
        *(one for name in of_each[0] | of_each[1] for one in _named(name, *of_each)),
    ]


def _named(name: str, left: dict[str, str], right: dict[str, str]) -> list[Setting]:
    """Return a setting of two runs; for auto-clip, those of its own in which the policies differ."""
    a, b = _told(name, left), _told(name, right)
    inside = differences(a, b) if name == _CLIP else {}
    return [Setting(f"{name} {field}", *both) for field, both in inside.items()] or [Setting(name, a, b)]


def _told(name: str, told: dict[str, str]) -> str:
    """Return a setting of a run; where it lacks one but has others of its kind, it is known that it has none."""
    if told.get(name):
        return told[name]
    kind = next((mark for mark in ("rule ", _OF_OPTIMIZER) if mark in name), None)
    return "none" if kind is not None and any(kind in other for other in told) else UNKNOWN


def _of_steps(name: str, a: Series, b: Series, values: tuple[Floats, Floats], missing: str) -> Setting:
    steps, at_a, at_b = np.intersect1d(a.step, b.step, return_indices=True)
    one, other = values[0][at_a], values[1][at_b]
    differ = np.flatnonzero(~((one == other) | (np.isnan(one) & np.isnan(other))))
    since = int(steps[differ[0]]) if len(differ) else None
    return Setting(name, _course(values[0], missing), _course(values[1], missing), since)


def _course(values: Floats, missing: str) -> str:
    """Return a number that may change in the course of a run in words."""
    known = values[~np.isnan(values)]
    if not len(known):
        return missing
    first, last, largest = (number(float(one), 6).removesuffix(".0") for one in (known[0], known[-1], known.max()))
    if (known == known[0]).all():
        return first
    peak = "" if largest in (first, last) else f" up to {largest} and"
    return f"from {first}{peak} to {last}"


def _of_session(log: RunLog) -> dict[str, str]:
    """Return the settings of the last session in words, by name."""
    session = log.sessions[-1]
    facts, environment = session.facts, session.environment
    shape = " x ".join(map(str, facts.prediction))
    told = {
        "optimizer": facts.optimizer or UNKNOWN,
        **{f"{name}{_OF_OPTIMIZER}": value for name, value in facts.optimizer_options.items()},
        "batch (shape of the first prediction)": shape or UNKNOWN,
        "loss": facts.loss or UNKNOWN,
        "model": facts.model,
        "layers": str(facts.layers),
        "parameters": f"{facts.parameters:,}",
        _CLIP: str(environment.get("clip") or "off"),
    }
    for rule in environment.get("rules", []):
        for name, value in rule["settings"].items():
            told[f"rule {rule['code']} {name}"] = str(value)
    for name, value in environment.get("versions", {}).items():
        told[f"version of {name}"] = str(value)
    for name in ("platform", "program"):
        told[name] = str(environment.get(name) or UNKNOWN)
    return told
