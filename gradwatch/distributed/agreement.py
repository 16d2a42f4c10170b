"""The settings that all processes of a training must share, as text, and a description of their differences."""

from __future__ import annotations

import enum
import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.rules import Rule

PACE = ("gradwatch", "every", "budget")  # if these differ, rows of one process have no counterpart in another
_NAMED = 3  # most ranks to name for one value, and most differences to describe
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings_of(rules: Iterable[Rule], policy: AutoClip | None, pace: dict[str, Any]) -> dict[str, str]:
    """Return the settings that determine what is measured, judged and done, as text by name.

    Processes with equal texts reach equal decisions.

    Args:
        rules: the rules to judge with.
        policy: the policy of auto-clip; None: no auto-clip.
        pace: further settings, such as those named in ``PACE``.
    """
    found = {name: text(value) for name, value in pace.items()}
    found |= {f"rule {rule.code}": text(rule) for rule in rules}
    if policy is None:
        return found | {"clip": "none"}
    return found | {name: text(getattr(policy, name)) for name in type(policy).model_fields}


def text(value: Any) -> str:
    """Return a value as text that is the same in each process: without addresses, and with sets and dicts sorted.

    Functions and classes are represented by their name, objects of other classes by the name of the class.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum)):
        return _ADDRESS.sub("", repr(value))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(text, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(text, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{text(key)}: {text(one)}' for key, one in value.items()))}}}"
    names: Iterable[str] | None = None
    if isinstance(value, BaseModel):
        names = type(value).model_fields
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
    if names is not None:
        return f"{type(value).__name__}({', '.join(f'{name}={text(getattr(value, name))}' for name in names)})"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def differences(settings: Sequence[dict[str, str]], ranks: Sequence[int]) -> dict[str, str]:
    """Return the settings that differ between processes, by name, as ``"rank 0 20, rank 1 5"``.

    Args:
        settings: the settings of each process, as returned by `settings_of`.
        ranks: the ranks of these processes.
    """
    found = {}
    for name in dict.fromkeys(name for one in settings for name in one):
        values: dict[str, list[int]] = {}
        for rank, one in zip(ranks, settings, strict=True):
            values.setdefault(one.get(name, "none"), []).append(rank)
        if len(values) > 1:
            found[name] = ", ".join(f"{_named(who)} {value}" for value, who in values.items())
    if any(one["clip"] == "none" for one in settings):  # the other settings are missing there, not different
        policy = {
            name for one in settings for name in one if name not in PACE and not name.startswith(("rule ", "weights "))
        }
        found = {name: told for name, told in found.items() if name == "clip" or name not in policy}
    return found


def told(found: dict[str, str]) -> str:
    """Return a description of the first three differences, and the number of the others."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(f"{name}: {values}" for name, values in list(found.items())[:_NAMED]) + more


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_NAMED]))}{more}"
