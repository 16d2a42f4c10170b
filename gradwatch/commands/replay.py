"""`gradwatch replay`: other thresholds over the rows of a run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from gradwatch.replay import Replayed, replay, with_settings
from gradwatch.runlog import RunLog
from gradwatch.runlog.plain import to_json

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from gradwatch.records import Incident

NAME = "replay"
HELP = "judge the recorded rows of a run again, with other thresholds"
EXAMPLES = """\
  gradwatch replay runs/today                              the rules as they were
  gradwatch replay runs/today --rule GW301.limit=30        one threshold changed
  gradwatch replay runs/today --rule GW203.for_steps=10 --rule GW203.limit=2 --json

Auto-clip is not replayed: an incident may close at another step than it did. Where the log was thinned, the rules see
each eighth row's layers only."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """See `gradwatch.commands.Command`."""
    parser.add_argument("run_log", metavar="RUN", help="the folder of a run log, such as runs/today")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="CODE.SETTING=VALUE",
        help="a threshold to change; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """See `gradwatch.commands.Command`."""
    with RunLog(options.run_log) as log:
        rules, unknown = log.rules()
        rules = with_settings(rules, options.rule)
        before, fired = log.incidents, _fired(log.alarms)
        again = replay(log.history(), log.rows(), rules)
    now = _fired(again.alarms)
    if options.json:
        told = {
            "rows": again.rows,
            "left out": unknown,
            "recorded": {"alarms": fired, "incidents": [json.loads(to_json(one)) for one in before]},
            "replayed": {"alarms": now, "incidents": [json.loads(to_json(one)) for one in again.incidents]},
        }
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return 0
    _show(console, before, fired, again, now)
    for code in unknown:
        console.print(f"left out: {code} is no rule of gradwatch's own", markup=False, highlight=False)
    return 0


def _fired(alarms: Any) -> dict[str, int]:
    """Return how often each rule began to fire."""
    counts: dict[str, int] = {}
    for alarm in alarms:
        if alarm.state == "firing":
            counts[alarm.code] = counts.get(alarm.code, 0) + 1
    return dict(sorted(counts.items()))


def _show(
    console: Console, before: list[Incident], fired: dict[str, int], again: Replayed, now: dict[str, int]
) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"{again.rows:,} rows judged again"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("alarms", "then", "replayed"):
        table.add_column(heading, justify="left" if heading == "alarms" else "right")
    for code in sorted(fired.keys() | now.keys()):
        style = "" if fired.get(code, 0) == now.get(code, 0) else "bold"
        table.add_row(Text(code, style), Text(str(fired.get(code, 0)), style), Text(str(now.get(code, 0)), style))
    if fired or now:
        console.print(table)
    same = {str(one) for one in before} & {str(one) for one in again.incidents}
    for heading, incidents in (("then", before), ("replayed", list(again.incidents))):
        console.print(Text(f"incidents, {heading}:", "bold"))
        for one in incidents:
            console.print(Text(f"  {one}", "dim" if str(one) in same else ""))
        if not incidents:
            console.print("  none")
