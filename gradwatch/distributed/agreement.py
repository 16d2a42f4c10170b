"""What processes that train together must have alike, as text, and how to say where they differ."""

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

PACE = ("gradwatch", "every", "budget")  # where these differ, rows of one process have no counterpart in another
_NAMED = 3  # ranks that are named for one value, and differences that are told
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings_of(rules: Iterable[Rule], policy: AutoClip | None, pace: dict[str, Any]) -> dict[str, str]:
    """Return all that decides what is measured, judged and done, by name: equal texts in each process, equal decisions."""
    found = {name: text(value) for name, value in pace.items()}
    found |= {f"rule {rule.code}": text(rule) for rule in rules}
    if policy is None:
        return found | {"clip": "none"}
    return found | {name: text(getattr(policy, name)) for name in type(policy).model_fields}


def text(value: Any) -> str:
    """Return a value as text that is the same in each process: without addresses, sets and dicts in order.

    Of what has no such text, such as a function or an object of a class of the user's own, only the name of its kind.
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
    """Return what differs between processes, by name, as "rank 0 20, rank 1 5"; ``ranks`` are their numbers."""
    found = {}
    for name in dict.fromkeys(name for one in settings for name in one):
        values: dict[str, list[int]] = {}
        for rank, one in zip(ranks, settings, strict=True):
            values.setdefault(one.get(name, "none"), []).append(rank)
        if len(values) > 1:
            found[name] = ", ".join(f"{_named(who)} {value}" for value, who in values.items())
    if any(one["clip"] == "none" for one in settings):  # how others' auto-clip is set tells nothing more
        policy = {
            name for one in settings for name in one if name not in PACE and not name.startswith(("rule ", "weights "))
        }
        found = {name: told for name, told in found.items() if name == "clip" or name not in policy}
    return found


def told(found: dict[str, str]) -> str:
    """Return the first few differences in words."""
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(f"{name}: {values}" for name, values in list(found.items())[:_NAMED]) + more


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_NAMED]))}{more}"
