"""`gradwatch rules`: lists every rule, with its code and its sign."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from gradwatch.rules import RULES

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "rules"
HELP = "list every rule"
EXAMPLES = """\
  gradwatch rules
  gradwatch rules --json       the same as JSON, with all settings"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the rules; return the exit code."""
    if options.json:
        rows = [
            {
                "code": rule.code,
                "name": rule.name,
                "sign": rule.sign,
                "kind": rule.kind,
                "settings": rule().model_dump(),
            }
            for rule in RULES
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("code", "name", "sign", "points to", "fires when"):
        table.add_column(heading)
    for rule in RULES:
        settings = rule()
        steps = f" for {settings.for_steps} steps" if settings.for_steps > 1 else ""
        table.add_row(rule.code, rule.name, rule.sign, rule.kind, f"value > {settings.limit:g}{steps}")
    console.print(table)
    return 0
