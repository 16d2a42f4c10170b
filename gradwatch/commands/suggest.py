"""`gradwatch suggest`: suggests a clip threshold from the gradient norms of a run."""

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
HELP = "suggest a clip threshold from the gradient norms of a run"
EXAMPLES = """\
  gradwatch suggest runs/today
  gradwatch suggest runs/today --json

The suggestion is computed from the norms before any clip."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the suggested threshold; return the exit code."""
    with RunLog(options.run_log) as log:
        found = suggest(log.series().global_norm)
    if options.json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
    else:
        console.print(str(found), soft_wrap=True)
    return 0
