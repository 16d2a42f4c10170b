"""A `rich.text.Text` for reports and commands that contains only printable characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from typing import Any

    from rich.style import Style


class Line(Text):
    """One line of text, in which control characters and line ends are escaped as by `gradwatch.text.printable`."""

    def __init__(self, text: object = "", style: str | Style = "", **settings: Any) -> None:
        super().__init__(printable(text), style, **settings)

    def append(self, text: Text | str, style: str | Style | None = None) -> Line:
        """Append text like `rich.text.Text.append`, with a string escaped; return the line."""
        super().append(text if isinstance(text, Text) else printable(text), style)
        return self
