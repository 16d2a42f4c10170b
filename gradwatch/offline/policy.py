"""The policy of auto-clip as a run log keeps it: in words, as Python writes it."""

from __future__ import annotations

import ast

ABSENT = "none"


def fields_of(policy: str) -> dict[str, str]:
    """Return the settings of a policy in words, by name; {} if it is not written as a call with keywords.

    >>> fields_of("AutoClip(clip=ClipNorm(max_norm=1.0), hold=30)")
    {'clip': 'ClipNorm(max_norm=1.0)', 'hold': '30'}
    """
    call = _call(policy)
    return {} if call is None else {one.arg: ast.unparse(one.value) for one in call.keywords if one.arg}


def differences(left: str, right: str) -> dict[str, tuple[str, str]]:
    """Return the settings in which two policies differ, by name; {} if they do not, or are not written alike.

    A setting that is itself a call of the same name on both sides, such as a clip, is told by its own settings.

    >>> differences("AutoClip(clip=ClipNorm(max_norm=1.0), hold=30)", "AutoClip(clip=ClipNorm(max_norm=2.0), hold=30)")
    {'clip.max_norm': ('1.0', '2.0')}
    """
    one, other = _call(left), _call(right)
    if one is None or other is None or ast.unparse(one.func) != ast.unparse(other.func):
        return {}
    mine, others = fields_of(left), fields_of(right)
    found: dict[str, tuple[str, str]] = {}
    for name in mine | others:
        a, b = mine.get(name, ABSENT), others.get(name, ABSENT)
        if a != b:
            inside = differences(a, b)
            found |= {f"{name}.{field}": both for field, both in inside.items()} or {name: (a, b)}
    return found


def _call(text: str) -> ast.Call | None:
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the words of a clip of the user's own
        return None
    return node if isinstance(node, ast.Call) and not node.args and all(one.arg for one in node.keywords) else None
