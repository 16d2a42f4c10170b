"""Text that came from outside, made fit for a person's eyes: one line, no control characters, characters that there are.

Names of layers and rules, texts of errors and notes, and whatever a run log of somebody else holds may contain escape
sequences, newlines and characters that turn the writing around. Data keeps them; where text leaves for a person it goes
through here.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# printable to Python, and shown by no terminal: joiners, fillers, variation selectors
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# what gradwatch's own signs become where they cannot be written; each as wide as it was
_STAND_INS = {
    "·": "-", "×": "x", "µ": "u", "…": "~", "→": ">", "↑": "^", "↓": "v", "•": "*", "–": "-", "—": "-",
    "●": "*", "■": "#", "▲": "^", "✓": "v", "─": "-", "━": "-", "│": "|",
    "▁": "_", "▂": ".", "▃": "-", "▄": "=", "▅": "+", "▆": "*", "▇": "%", "█": "#", "░": ".",
}  # fmt: skip


def printable(text: object) -> str:
    r"""Return ``str(text)`` as one line in which whatever cannot be seen stands as Python writes it.

    Control and formatting characters, line ends, lone surrogates and characters without a shape become ``\x1b``, ``\n``,
    ``\u202e`` and so on; blanks of all kinds stay.

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
    """Return plain values (as JSON knows them) with every text in them made `printable`, keys included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): printable_all(one) for key, one in value.items()}
    return [printable_all(one) for one in value] if isinstance(value, list) else value


def writable(text: str, encoding: str | None) -> str:
    """Return a text that a stream of this encoding can take, as wide as it was: what cannot be written becomes ``?``.

    ``encoding``: None is UTF-8; one that is not known is taken for ASCII.
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
