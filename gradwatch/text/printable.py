"""Conversion of foreign text into one printable line without control characters.

Names of layers and rules, texts of errors and notes, and the contents of run logs of others may contain escape sequences,
newlines and characters that reverse the direction of writing. Data keeps them; text that is shown to people is converted.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# printable according to Python but shown by no terminal: joiners, fillers, variation selectors
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# replacements of gradwatch's own characters if they cannot be encoded, each of the same width
_STAND_INS = {
    "·": "-", "×": "x", "µ": "u", "…": "~", "→": ">", "↑": "^", "↓": "v", "•": "*", "–": "-", "—": "-",
    "●": "*", "■": "#", "▲": "^", "✓": "v", "─": "-", "━": "-", "│": "|",
    "▁": "_", "▂": ".", "▃": "-", "▄": "=", "▅": "+", "▆": "*", "▇": "%", "█": "#", "░": ".",
}  # fmt: skip


def printable(text: object) -> str:
    r"""Return ``str(text)`` as one line in which invisible characters are written as Python's escape sequences.

    Control and formatting characters, line ends, lone surrogates and invisible characters become ``\x1b``, ``\n``,
    ``\u202e`` and so on. Blanks of all kinds are kept.

    >>> printable("fc1\x1b[2J\nweight")
    'fc1\\x1b[2J\\nweight'
    """
    line = str(text)
    if line.isprintable() and _UNSEEN.search(line) is None:
        return line
    return "".join(map(_seen, line))


def _seen(char: str) -> str:
    if (char.isprintable() and _UNSEEN.match(char) is None) or char in "\xa0\u2009\u202f\u3000":
        return char
    return char.encode("ascii", "backslashreplace").decode() if ord(char) > 127 else repr(char)[1:-1]


def printable_all(value: Any) -> Any:
    """Return JSON-like values with every text in them made `printable`, including keys."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): printable_all(one) for key, one in value.items()}
    return [printable_all(one) for one in value] if isinstance(value, list) else value


def writable(text: str, encoding: str | None) -> str:
    """Return ``text`` with characters that ``encoding`` cannot represent replaced by others of the same width, at last ``?``.

    ``encoding`` None stands for UTF-8; an unknown encoding is treated as ASCII.
    """
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except LookupError:
        return writable(text, "ascii")
    except UnicodeError:
        return "".join(char if _fits(char, encoding) else _stand_in(char) for char in text)
    return text


def _stand_in(char: str) -> str:
    if unicodedata.combining(char):
        return ""
    return _STAND_INS.get(char, "??" if unicodedata.east_asian_width(char) in "WF" else "?")


def _fits(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeError:
        return False
    return True
