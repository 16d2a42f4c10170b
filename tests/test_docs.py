"""The documentation's links lead somewhere, as files on GitHub and as pages of the site, and the site lists each page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def prose_of(page: Path) -> str:
    """Return a page without its blocks of code and its code in lines."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]+`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+?)\s*$", prose_of(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links_of(page: Path) -> list[str]:
    """Return the links to files of the repository, and to headings in them, that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose_of(page)):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    """So it works for a reader on GitHub; the strict build of the site checks that it works there."""
    assert broken_links_of(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """Both kinds: a file that is missing, and a heading."""
    page = tmp_path / "page.md"
    page.write_text("# Here it is\n[a](page.md#here-it-is) [b](#there) [c](gone.md)\n```\n[d](code.md)\n```\n")
    assert broken_links_of(page) == ["#there", "gone.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_part_of_a_page_stands_there_twice(page: Path) -> None:
    """Neither a heading, nor the marks of a table, nor a long line of prose."""
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.startswith(("#", "<!--")) or len(line) > 80]
    lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in set(lines) if lines.count(line) > 1] == []


def test_the_site_lists_every_page_once() -> None:
    """A page that nobody finds is not read."""
    listed = re.findall(r"(?m)^ +- [^:\n]+: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)
