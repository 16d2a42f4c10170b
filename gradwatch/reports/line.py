"""The text that reports and commands draw: `rich.text.Text`, but whatever it is made of is fit to be printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from gradwatch.printable import printable

if TYPE_CHECKING:
    from typing import Any

    from rich.style import Style


class Line(Text):
    """One line: control characters, line ends and the like stand in it as Python writes them. See `gradwatch.printable`."""

    def __init__(self, text: object = "", style: str | Style = "", **settings: Any) -> None:
        super().__init__(printable(text), style, **settings)

    def append(self, text: Text | str, style: str | Style | None = None) -> Line:
        """See `rich.text.Text.append`."""
        super().append(text if isinstance(text, Text) else printable(text), style)
        return self
