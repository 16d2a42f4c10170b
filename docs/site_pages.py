"""The pages of the documentation site that are no file under docs/: a hook of MkDocs, see mkdocs.yml.

README, changelog and contributing guide are pages of the site too; each rule has the page that `gradwatch explain` prints; the
reference lists all that the package exports. Links are those that work on GitHub, and are made to fit here.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import gradwatch
from gradwatch.reports import REPORTS
from gradwatch.rules import RULES
from gradwatch.verdict import VerdictSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
AT_THE_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
REFERENCE = {
    "monitor": ("Watching", "attach monitor_of Monitor find_nonfinite"),
    "autoclip": ("Auto-clip", "AutoClip Suggestion"),
    "clips": (
        "Clips",
        "Clip ClipNorm ClipValue ClipLayerNorm ClipNormThenValue ScaleToNorm ClipAGC ClipPercentile ClipZScore ClipAdaGC",
    ),
    "rules": ("Rules", "Rule default_rules"),
    "records": ("Records", "Incident Alarm ClipRecord Origin Operand Row Snapshot"),
    "reports": ("Reports", "Report"),
    "errors": ("Errors", "GradwatchError UsageError TrainingUnstableError NonFiniteError"),
}
# what other parts of the package call on an object that users have too
NOT_FOR_USERS = {"Monitor": "record keep_batches start end replaced note writes clips_any owns_any"}
FROM_THE_WEB = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:|<link[^>]*\shref=["']?https?:""")
IN_A_SHEET = re.compile(r"""@import\s+["']|url\(["']?https?:""")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of rules and of the reference into the navigation."""
    written = {
        "rules/": [
            {"All rules": "rules/index.md"},
            *_entries("rules", [rule.code for rule in RULES]),
            "rules/verdict.md",
        ],
        "api/": [f"api/{name}.md" for name in _reference()],
    }
    config.nav = _navigation(config.nav or [], written)
    return config


def _entries(folder: str, names: list[str]) -> list[str]:
    return [f"{folder}/{name}.md" for name in names]


def _navigation(nav: list[Any], written: dict[str, list[Any]]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _navigation(target, written)})
        else:
            kept.append({title: written.get(target, target)})
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file."""
    pages = {
        **{target: (ROOT / name).read_text(encoding="utf-8") for name, target in AT_THE_ROOT.items()},
        **{f"rules/{rule.code}.md": _of_rule(rule) for rule in RULES},
        "rules/verdict.md": VerdictSettings.documentation(),
        "rules/index.md": _all_rules(),
        **{f"api/{name}.md": page for name, page in _reference().items()},
    }
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def _of_rule(rule: type[gradwatch.Rule]) -> str:
    values = "\n".join(f"| `{name}` | {field.default} |" for name, field in rule.model_fields.items())
    return (
        f"{rule.documentation()}\n## Settings\nSign: {rule.sign}. Kind of incident: {rule.kind}.\n\n"
        f"| setting | default |\n| --- | --- |\n{values}\n"
    )


def _all_rules() -> str:
    rows = "\n".join(
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.sign} | {rule.kind} | {rule().limit:g} | {rule().for_steps} |"
        for rule in RULES
    )
    return (
        "# The rules\n\nEach rule measures one quantity and fires where it is above its limit for a number of steps in a row. "
        "When that becomes an incident is decided by [the verdict](verdict.md).\n\n"
        f"| code | what it sees | sign | kind of incident | limit | steps |\n| --- | --- | --- | --- | --- | --- |\n{rows}\n"
    )


def _reference() -> dict[str, str]:
    listed = " ".join(names for _, names in REFERENCE.values()).split()
    if sorted(listed) != sorted(set(gradwatch.__all__)):
        differing = sorted(set(listed) ^ (set(gradwatch.__all__)))
        raise PluginError(
            f"docs/site_pages.py: REFERENCE and gradwatch.__all__ differ in {differing}; put each on one page."
        )
    pages = {}
    for name, (title, names) in REFERENCE.items():
        places = {_place(getattr(gradwatch, one)): NOT_FOR_USERS.get(one, "").split() for one in names.split()}
        if name == "reports":
            places |= {path.replace(":", "."): [] for path in sorted(REPORTS.values())}
        pages[name] = f"# {title}\n\n" + "\n".join(_entry(place, hidden) for place, hidden in places.items())
    if (ROOT / "gradwatch" / "integrations").is_dir():
        pages["integrations"] = "# Integrations\n\n" + "\n".join(map(_entry, _integrations()))
    return pages


def _integrations() -> list[str]:
    """Return the classes for trainers by their place; frameworks need not be installed."""
    files = sorted((ROOT / "gradwatch" / "integrations").glob("*.py"))
    classes = [
        (file.stem, re.findall(r"(?m)^class (Gradwatch\w+)", file.read_text(encoding="utf-8"))) for file in files
    ]
    return [f"gradwatch.integrations.{module}.{name}" for module, names in classes for name in names]


def _place(exported: Any) -> str:
    return f"{exported.__module__}.{exported.__qualname__}"


def _entry(place: str, hidden: Sequence[str] = ()) -> str:
    options = {
        "filters": ["!^_", *(f"!^{name}$" for name in hidden)],
        "merge_init_into_class": not hidden,  # what users do not make themselves has no signature
        "show_root_full_path": place.startswith("gradwatch.integrations."),  # where several have one name
    }
    return f"::: {place}\n    options: {json.dumps(options)}\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Return the page with its links made to fit the site, and with the codes of rules as links in tables."""
    here = page.file.src_uri
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # it would list this page alone
    if here.startswith(("api/", "rules/")):
        return markdown
    origin = "" if here in AT_THE_ROOT.values() else "docs"
    markdown = re.sub(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)", lambda found: _link(found, origin), markdown)
    return re.sub(r"(?m)^\| (GW\d{3}) \|", r"| [\1](rules/\1.md) |", markdown)


def _link(found: re.Match[str], origin: str) -> str:
    """Return a link of a page in the folder ``origin`` of the repository as it is on a page at the top of the site."""
    picture, text, target = found.groups()
    path, sharp, anchor = target.partition("#")
    if not path or ":" in path:
        return found[0]
    place = posixpath.normpath(posixpath.join(origin, path))
    if place in AT_THE_ROOT:
        return f"{picture}[{text}]({AT_THE_ROOT[place]}{sharp}{anchor})"
    if place.startswith("docs/"):
        return f"{picture}[{text}]({place.removeprefix('docs/')}{sharp}{anchor})"
    return (
        text if (ROOT / place).exists() else found[0]
    )  # a file of the repository that is no page, or one that is missing


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from the web."""
    for folder, _, names in os.walk(config.site_dir):
        for path in (Path(folder, name) for name in names):
            loads = {".html": FROM_THE_WEB, ".css": IN_A_SHEET}.get(path.suffix)
            found = loads and loads.search(path.read_text(encoding="utf-8"))
            if found:
                raise PluginError(f"{path.relative_to(config.site_dir)} loads from the web: {found[0]}")
