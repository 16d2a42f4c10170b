"""`gradwatch list`: lists the runs below a folder."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradwatch.commands.values import a_path
from gradwatch.errors import GradwatchError, UsageError
from gradwatch.records import SEVERITIES
from gradwatch.runlog.schema import FILE

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "list"
HELP = "list the runs below a folder, newest last"
EXAMPLES = """\
  gradwatch list               runs below the current folder
  gradwatch list runs --json   runs below the folder runs, as JSON"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        default=".",
        type=a_path,
        help="the folder to search (default: the current one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """List the runs; return the exit code."""
    folder: Path = options.folder
    try:
        there = folder.is_dir()
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}. Give a folder that contains runs.") from error
    if not there:
        raise UsageError(f"There is no folder {folder}. Give a folder that contains runs, such as runs.")
    found = sorted((_told(path.parent) for path in folder.rglob(FILE)), key=lambda told: told["started"] or 0)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    _show(folder, found, console)
    return 0


def _show(folder: Path, found: list[dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    from gradwatch.records import Facts
    from gradwatch.reports.line import Line
    from gradwatch.reports.view import SEVERITY_STYLES, brief

    if not found:
        console.print(Line(f"there are no runs below {folder}: gradwatch.attach(model, log=...) records one"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "model", "began", "state", "steps", "loss", "incidents"):
        justify: Literal["left", "right"] = "right" if heading in ("steps", "loss") else "left"
        table.add_column(heading, justify=justify, no_wrap=heading != "run", overflow="fold")
    for told in found:
        if told["error"]:
            continue
        loss, worst = told["loss"], told["worst"]
        table.add_row(
            Line(str(Path(told["run"]).relative_to(folder))),
            Line(Facts(model=told["model"], name=told["name"]).called),
            datetime.fromtimestamp(told["started"]).astimezone().strftime("%m-%d %H:%M"),
            told["state"],
            f"{told['steps']:,}",
            "-" if loss is None else brief(float(loss)),
            Line(f"{told['incidents']}, {worst}" if worst else "-", SEVERITY_STYLES.get(worst or "", "dim")),
        )
    console.print(table)
    for told in found:
        if told["error"]:
            console.print(Line(told["error"], "red"))


def _told(folder: Path) -> dict[str, Any]:
    from gradwatch.runlog import RunLog

    told: dict[str, Any] = {"run": str(folder), "started": None, "error": None}
    try:
        with RunLog(folder) as log:
            sessions, incidents = log.sessions, log.incidents
            last, count, loss = log.end()
            ended = sessions[-1].ended is not None
            told |= {
                "model": sessions[-1].facts.model,
                "name": sessions[-1].facts.name,
                "started": sessions[0].started,
                "state": "running" if log.is_written else "ended" if ended else "cut off",
                "steps": last + 1,
                "rows": count,
                "loss": loss,
                "incidents": len(incidents),
                "worst": max((one.severity for one in incidents), key=SEVERITIES.index, default=None),
            }
    except GradwatchError as error:
        told["error"] = str(error)
    return told
