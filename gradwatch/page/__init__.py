"""A run as one page that opens offline: `gradwatch report RUN --html FILE`."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError
from gradwatch.page.content import content_of
from gradwatch.printable import printable, printable_all
from gradwatch.runlog.plain import to_json

if TYPE_CHECKING:
    from gradwatch.runlog import RunLog


def write_page(log: RunLog, path: str | Path) -> None:
    """Write the page; everything it needs is in it.

    Raises:
        UsageError: plotly is not installed, or the file cannot be written, or is another program's.
        RunLogError: the run log is damaged.
    """
    text, path = page_of(log), Path(path)
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if not file.read(64).lstrip().lower().startswith(b"<!doctype html"):
                    raise UsageError(f"{path} is there already, and no page. Give another file with --html.")
        path.write_text(text, encoding="utf-8")
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
    content = json.dumps(printable_all(json.loads(to_json(content_of(log)))))
    pieces = {
        "title": html.escape(printable(f"{log.folder.name or 'run'} · gradwatch")),
        "style": (parts / "page.css").read_text(encoding="utf-8"),
        "content": content.replace("<", "\\u003c"),  # in a script element, only "<" could end it
        "plotly": get_plotlyjs(),
        "script": (parts / "page.js").read_text(encoding="utf-8"),
    }
    template = (parts / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: pieces[mark[1]], template)  # once: a piece may hold a mark itself
