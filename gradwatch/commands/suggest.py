"""`gradwatch suggest`: what threshold a run's own norms suggest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from gradwatch.autoclip.suggest import suggest
from gradwatch.commands.values import a_path
from gradwatch.runlog import RunLog

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "suggest"
HELP = "say what clip threshold a run's own norms suggest"
EXAMPLES = """\
  gradwatch suggest runs/today
  gradwatch suggest runs/today --json

First observe common norms, then choose. The norms are those before any clip."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """See `gradwatch.commands.Command`."""
    parser.add_argument("run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """See `gradwatch.commands.Command`."""
    with RunLog(options.run_log) as log:
        found = suggest(log.series().global_norm)
    if options.json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
    else:
        console.print(str(found), soft_wrap=True)
    return 0
