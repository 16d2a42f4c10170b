"""`gradwatch replay`: judges the rows of a run again, with other limits."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from gradwatch.commands.values import a_path
from gradwatch.offline.policy import fields_of
from gradwatch.offline.replay import Replayed, replay, with_settings
from gradwatch.offline.traces import is_trace, read_trace
from gradwatch.records import EXPLOSION
from gradwatch.rules import default_rules
from gradwatch.runlog import RunLog
from gradwatch.runlog.plain import to_json
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from gradwatch.records import Incident
    from gradwatch.verdict import VerdictSettings

NAME = "replay"
HELP = "judge the rows of a run log or a written trace again, with other limits"
EXAMPLES = """\
  gradwatch replay runs/today                              with the rules of the run
  gradwatch replay runs/today --rule GW301.limit=30        one limit changed
  gradwatch replay runs/today --rule verdict.far=4         the verdict's own limits (gradwatch explain verdict)
  gradwatch replay runs/today --rule GW203.for_steps=10 --rule GW203.limit=2 --json
  gradwatch replay spike.txt                               a trace written by hand, or taken from a publication

Auto-clip is not replayed, so an explosion may close at another step; the output says so. Where the log was thinned,
the rules see the layers of every eighth row only."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument(
        "run_log", metavar="RUN", type=a_path, help="the folder of a run log, or a trace: a text file of series"
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="CODE.SETTING=VALUE",
        help="a limit to change; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """Replay a run and print the result; return the exit code."""
    path = options.run_log
    unknown: list[str] = []
    before: list[Incident] = []
    fired: dict[str, int] = {}
    closing = ""
    if is_trace(path):
        again = replay(*read_trace(path).rows(), *with_settings(default_rules(), options.rule))
    else:
        with RunLog(path) as log:
            recorded, unknown = log.rules()
            rules, verdict = with_settings(recorded, options.rule)
            before, fired = log.incidents, _fired(log.alarms)
            origins = [one.origin for one in before if one.origin is not None]
            again = replay(log.history(), log.rows(), rules, verdict, origins)
            if any(one.kind in EXPLOSION for one in (*before, *again.incidents)):
                closing = _closing(log, verdict)
    now = _fired(again.alarms)
    if options.json:
        told = {
            "rows": again.rows,
            "left out": unknown,
            "auto-clip": closing or None,
            "recorded": {"alarms": fired, "incidents": [json.loads(to_json(one)) for one in before]},
            "replayed": {"alarms": now, "incidents": [json.loads(to_json(one)) for one in again.incidents]},
        }
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return 0
    _show(console, None if is_trace(path) else before, fired, again, now)
    from gradwatch.reports.line import Line

    if closing:
        console.print(Line(closing))
    for code in unknown:
        console.print(Line(f"left out: {code} is not one of gradwatch's rules"))
    return 0


def _fired(alarms: Any) -> dict[str, int]:
    """Return the number of times that each rule began to fire, by code."""
    counts: dict[str, int] = {}
    for alarm in alarms:
        if alarm.state == "firing":
            counts[alarm.code] = counts.get(alarm.code, 0) + 1
    return dict(sorted(counts.items()))


def _closing(log: RunLog, verdict: VerdictSettings) -> str:
    """Return after how many calm steps explosions close here, and after how many in the run, if it had auto-clip; else ""."""
    policies = [str(one.environment["clip"]) for one in log.sessions if one.environment.get("clip")]
    if not policies:
        return ""
    hold = fields_of(policies[-1]).get("hold", "")
    steps = counted(verdict.calm_steps, "calm step")
    held = f"after {hold} or more" if hold.isdecimal() else "when auto-clip was released"
    return f"auto-clip is not replayed: an explosion closes after {steps} here (verdict.calm_steps), {held} in the run (hold)."


def _show(
    console: Console, before: list[Incident] | None, fired: dict[str, int], again: Replayed, now: dict[str, int]
) -> None:
    """Print the recorded alarms and incidents, if there are any, and the replayed ones."""
    from rich.table import Table

    from gradwatch.reports.line import Line

    console.print(Line(f"{again.rows:,} rows judged"))
    sides = [("replayed", list(again.incidents), now)]
    if before is not None:
        sides.insert(0, ("recorded", before, fired))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("alarms")
    for heading, *_ in sides:
        table.add_column(heading, justify="right")
    for code in sorted(fired.keys() | now.keys()):
        counts = [str(alarms.get(code, 0)) for *_, alarms in sides]
        style = "" if len(set(counts)) == 1 else "bold"
        table.add_row(Line(code, style), *(Line(count, style) for count in counts))
    if fired or now:
        console.print(table)
    same = {one.headline for one in before or ()} & {one.headline for one in again.incidents}
    for heading, incidents, _ in sides:
        console.print(Line(f"incidents, {heading}:", "bold"))
        for one in incidents:
            console.print(Line(f"  {one}", "dim" if one.headline in same else ""))
            for line in one.evidence if one.headline not in same else ():
                console.print(Line(f"    {line}", "dim"))
        if not incidents:
            console.print("  none")
