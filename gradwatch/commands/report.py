"""`gradwatch report`: reports what happened in a run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from gradwatch.commands.outputs import Output, check_outputs, write_outputs
from gradwatch.commands.values import a_path
from gradwatch.reports.standing import sentences
from gradwatch.runlog import RunLog
from gradwatch.runlog.latest import snapshot_of
from gradwatch.runlog.own import beginning_of
from gradwatch.runlog.plain import to_json
from gradwatch.runlog.state import state_of

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rich.console import Console

    from gradwatch.records import Snapshot

NAME = "report"
HELP = "report what happened in a run"
EXAMPLES = """\
  gradwatch report runs/today                   a summary in the terminal
  gradwatch report runs/today --html r.html     an HTML page with all plots, which opens offline
  gradwatch report runs/today --check           for CI: exit code 1 unless the verdict is healthy
  gradwatch report runs/today --json            the same as JSON"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today")
    parser.add_argument("--html", metavar="FILE", type=a_path, help="write an HTML page that opens offline")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if gradwatch did not write it")
    parser.add_argument("--check", action="store_true", help="exit code 1 unless the last verdict is healthy")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the report, and write the page if it is requested; return the exit code."""
    with RunLog(options.run_log) as log:
        snapshot = snapshot_of(log)
        if options.html is not None:
            _write_page(log, options.html, overwrite=options.overwrite)
        if options.json:
            sys.stdout.write(json.dumps(_plain(log, snapshot), indent=2) + "\n")
        else:
            _show(log, snapshot, options.html, console)
    return 1 if options.check and snapshot.verdict != "healthy" else 0


def _write_page(log: RunLog, path: Path, *, overwrite: bool) -> None:
    from gradwatch.page import is_page, page_of

    output = Output(
        path,
        write=lambda new: new.write_text(page_of(log), encoding="utf-8"),
        is_own=lambda old: is_page(beginning_of(old, 200)),
    )
    check_outputs(log, [output], "--html", overwrite=overwrite)
    write_outputs([output], "--html")


def _show(log: RunLog, snapshot: Snapshot, page: Path | None, console: Console) -> None:
    from gradwatch.reports.line import Line
    from gradwatch.reports.summary import Summary

    console.print(Summary(snapshot))
    sessions = log.sessions
    resumed = (
        f", resumed {len(sessions) - 1} times" if len(sessions) > 2 else ", resumed once" if len(sessions) == 2 else ""
    )
    for step, reason, _ in log.flights:
        console.print(Line(f"  flight recorder, step {step}: {reason} (all of it: --json)"))
    console.print(Line(f"  {log.folder}: {state_of(log)}{resumed}", "dim"))
    if page is not None:
        console.print(Line(f"  written: {page}", "dim"))


def _plain(log: RunLog, snapshot: Snapshot) -> dict[str, Any]:
    last, rows, loss = log.end()
    told: dict[str, Any] = json.loads(
        to_json(
            {
                "run": str(log.folder),
                "state": state_of(log),
                "steps": last + 1,
                "rows": rows,
                "verdict": snapshot.verdict,
                "standing": sentences(snapshot),
                "loss": loss,
                "facts": snapshot.facts,
                "layers": list(log.layers),
                "usual_norms": snapshot.usual_norms,
                "clip_use": snapshot.clip_use,
                "clipped": snapshot.clipped,
                "scaled_up": snapshot.scaled_up,
                "skipped": snapshot.skipped,
                "incidents": list(snapshot.incidents),
                "notes": list(snapshot.notes),
                "flights": [{"step": step, "reason": reason, **record} for step, reason, record in log.flights],
                "sessions": log.sessions,
            }
        )
    )
    return told
