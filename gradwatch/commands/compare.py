"""`gradwatch compare`: in which settings two runs differ, and where they diverge."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from gradwatch.commands.values import a_path
from gradwatch.offline.compare import Parting, parting
from gradwatch.offline.settings import Setting, settings_of
from gradwatch.runlog import RunLog
from gradwatch.runlog.plain import to_json
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.console import Console

NAME = "compare"
HELP = "show in which settings two runs differ, and where they diverge: losses, layers, incidents"
EXAMPLES = """\
  gradwatch compare runs/before runs/after
  gradwatch compare runs/before runs/after --json"""
_MOST = 12


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("left", metavar="RUN", type=a_path, help="the folder of a run log")
    parser.add_argument("right", metavar="RUN", type=a_path, help="the folder of the run log to compare it with")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """Compare two run logs; return the exit code."""
    with RunLog(options.left) as left, RunLog(options.right) as right:
        found, settings = parting(left, right), settings_of(left, right)
        if options.json:
            told = {
                "left": str(left.folder),
                "right": str(right.folder),
                "settings": [one for one in settings if one.differs],
                **{name: getattr(found, name) for name in Parting.__dataclass_fields__},
                "layers": [{"step": step, "layer": layer, "left": a, "right": b} for step, layer, a, b in found.layers],
                "incidents": {"left": left.incidents, "right": right.incidents},
            }
            sys.stdout.write(json.dumps(json.loads(to_json(told)), indent=2) + "\n")
        else:
            _show(console, left, right, found, settings)
    return 0


def _show(console: Console, left: RunLog, right: RunLog, found: Parting, settings: Sequence[Setting]) -> None:
    from rich.table import Table

    from gradwatch.reports.line import Line
    from gradwatch.reports.names import shorten
    from gradwatch.reports.view import brief

    def say(text: str, style: str = "") -> None:
        console.print(Line(text, style))

    say(f"{left.folder} against {right.folder}: {found.steps:,} steps in common", "bold")
    _show_settings(console, settings)
    if found.first_difference is None:
        say("  losses: equal at every common step")
    else:
        say(f"  losses: first difference at step {found.first_difference:,}")
        part = "never for three consecutive rows" if found.losses is None else f"from step {found.losses:,} on"
        say(f"  losses differ by more than a factor of 1.1: {part}")
    ends = [log.end() for log in (left, right)]
    last = ["NaN or not seen" if loss is None else brief(loss) for _, _, loss in ends]
    at = [f" at step {step:,}" if ends[0][0] != ends[1][0] else "" for step, _, _ in ends]
    say(f"  last loss: {last[0]}{at[0]} against {last[1]}{at[1]}")
    for log, only in ((left, found.only_left), (right, found.only_right)):
        if only:
            say(f"  only in {log.folder}: {', '.join(only[:4])}{' and more' if len(only) > 4 else ''}")
    if found.layers:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("  gradient norms diverge", "at step", "left", "right"):
            table.add_column(heading, justify="left" if heading.startswith(" ") else "right", no_wrap=True)
        for step, layer, a, b in found.layers[:_MOST]:
            table.add_row(Line("  " + shorten(layer, 50)), f"{step:,}", brief(a), brief(b))
        console.print(table)
        if len(found.layers) > _MOST:
            say(f"  and {counted(len(found.layers) - _MOST, 'more layer')}")
    else:
        say("  gradient norms: no layer differs by more than a factor of 4 for three consecutive rows")
    for log in (left, right):
        say(f"incidents of {log.folder}:", "bold")
        for one in log.incidents:
            say(f"  {one}")
        if not log.incidents:
            say("  none")


def _show_settings(console: Console, settings: Sequence[Setting]) -> None:
    from rich.table import Table

    from gradwatch.reports.line import Line

    different = [one for one in settings if one.differs]
    if different:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("  settings that differ", "left", "right"):
            table.add_column(heading)
        for one in different:
            since = "" if one.from_step is None else f", from step {one.from_step:,} on"
            table.add_row(Line(f"  {one.name}{since}"), Line(one.left), Line(one.right))
        console.print(table)
    same = [one.name for one in settings if not one.differs and one.known and not one.name.startswith("rule ")]
    console.print(Line(f"  {'otherwise ' if different else ''}the same: {', '.join(same) or 'nothing that is known'}"))
    unknown = [one.name for one in settings if not one.known]
    if unknown:
        console.print(Line(f"  not known of either: {', '.join(unknown)}"))
