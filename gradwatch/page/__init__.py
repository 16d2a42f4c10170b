"""A run as one page that opens offline: `gradwatch report RUN --html FILE`."""

from __future__ import annotations

import html
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError
from gradwatch.page.content import content_of
from gradwatch.runlog.plain import to_json

if TYPE_CHECKING:
    from gradwatch.runlog import RunLog


def write_page(log: RunLog, path: str | Path) -> None:
    """Write the page; everything it needs is in it.

    Raises:
        UsageError: plotly is not installed, or the file cannot be written.
        RunLogError: the run log is damaged.
    """
    text = page_of(log)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}. Give another file with --html.") from error


def page_of(log: RunLog) -> str:
    """Return the page. Names and texts of the run stand in it as JSON alone, and become text, never markup."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(
            "The page draws with plotly, which is not installed: pip install 'gradwatch[report]'"
        ) from None
    parts = resources.files(__name__)
    # in a script element, only "<" could end it
    content = to_json(content_of(log)).replace("<", "\\u003c")
    pieces = {
        "{{title}}": html.escape(f"{log.folder.name or 'run'} · gradwatch"),
        "{{style}}": (parts / "page.css").read_text(encoding="utf-8"),
        "{{content}}": content,
        "{{plotly}}": get_plotlyjs(),
        "{{script}}": (parts / "page.js").read_text(encoding="utf-8"),
    }
    page = (parts / "page.html").read_text(encoding="utf-8")
    for mark, piece in pieces.items():
        before, after = page.split(mark) if mark != "{{plotly}}" else page.rsplit(mark, 1)
        page = before + piece + after
    return page
