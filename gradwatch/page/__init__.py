"""A run as an HTML page that opens offline: `gradwatch report RUN --html FILE`."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import TYPE_CHECKING

from gradwatch.errors import UsageError
from gradwatch.page.content import content_of
from gradwatch.reports.card import palette
from gradwatch.runlog.plain import to_json
from gradwatch.text.extras import missing
from gradwatch.text.printable import printable, printable_all

if TYPE_CHECKING:
    from gradwatch.runlog import RunLog

_MARK = b'<meta name="generator" content="gradwatch">'  # at the beginning of page.html


def is_page(beginning: bytes) -> bool:
    """Return True if ``beginning``, the first bytes of a file, is that of a page written by `page_of`."""
    return beginning.startswith(b"<!doctype html") and _MARK in beginning


def page_of(log: RunLog) -> str:
    """Return the page as HTML, which needs no other file.

    Names and texts of the run, except the title, are included as JSON only, and the page shows them as text, not as markup.

    Raises:
        UsageError: plotly is not installed.
        RunLogError: the run log is damaged.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(missing("The page", "plotly", "report")) from None
    parts = resources.files(__name__)
    content = json.dumps(printable_all(json.loads(to_json(content_of(log)))))
    pieces = {
        "title": html.escape(printable(f"{log.folder.name or 'run'} · gradwatch")),
        "style": palette() + (parts / "page.css").read_text(encoding="utf-8"),
        "content": content.replace("<", "\\u003c"),  # only "<" could end the script element
        "plotly": get_plotlyjs(),
        "script": (parts / "page.js").read_text(encoding="utf-8"),
    }
    template = (parts / "page.html").read_text(encoding="utf-8")
    # in a single pass, since a piece may contain a mark
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: pieces[mark[1]], template)
