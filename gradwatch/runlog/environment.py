"""The environment of a run: versions, platform, rules with their thresholds, and auto-clip."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.rules import Rule


def environment_of(rules: Sequence[Rule], policy: AutoClip | None) -> dict[str, Any]:
    """Return the environment of this run as plain values that can be written as JSON."""
    return {
        "versions": {
            "gradwatch": _version("gradwatch"),
            "torch": _version("torch"),
            "numpy": _version("numpy"),
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "program": sys.argv[0] if sys.argv else "",
        "rules": [
            {
                "code": rule.code,
                "name": rule.name,
                "rule": type(rule).__name__,
                "settings": _settings(rule),
            }
            for rule in rules
        ],
        "clip": None if policy is None else str(policy),
    }


def _settings(rule: Rule) -> dict[str, Any]:
    try:
        return rule.model_dump(mode="json")
    except ValueError:  # a user's rule may have settings that cannot be written as JSON
        return {name: str(value) for name, value in rule}


def _version(package: str) -> str:
    told = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(told, str):  # which names the build too, such as 2.13.0+cpu
        return str(told)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
