"""Write measured tables between the marks of a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parent.parent


def between_marks(page: Path, mark: str, text: str) -> None:
    """Replace the text between ``<!-- mark -->`` and ``<!-- /mark -->`` in ``page``."""
    old = page.read_text()
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if (found := len(pattern.findall(old))) != 1:
        raise SystemExit(
            f"{page.name} has {found} pairs of marks for {mark}; expected one, <!-- {mark} --> and <!-- /{mark} -->."
        )
    page.write_text(pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", old))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
