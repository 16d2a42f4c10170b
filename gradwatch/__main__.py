"""The command line: `gradwatch demo`, `gradwatch rules`, `gradwatch explain CODE`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from gradwatch.errors import GradwatchError
from gradwatch.rules import RULES, rule_by_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_EXAMPLES = """examples:
  gradwatch demo               a training that explodes, watched, then saved by auto-clip
  gradwatch rules              every sign, with its code
  gradwatch rules --json       the same for a script
  gradwatch explain GW203      one sign: meaning, formula, what to do, when it is harmless

exit codes: 0 done, 2 bad usage"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="gradwatch",
        description="Training-stability diagnostics for PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a regression that explodes: watched only, then with auto-clip")
    demo.add_argument("--epochs", type=int, default=100, help="epochs of each training (default: 100)")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    rules = commands.add_parser("rules", help="list every rule")
    rules.add_argument("--json", action="store_true", help="print JSON")
    explain = commands.add_parser("explain", help="print one rule's page")
    explain.add_argument("code", metavar="CODE", help="such as GW203")
    options = parser.parse_args(arguments)

    from rich.console import Console

    try:
        return _run(options, Console())
    except GradwatchError as error:
        sys.stderr.write(f"gradwatch: {error}\n")
        return 2


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.command == "demo":
        from gradwatch.demo import run

        console.print(run(epochs=options.epochs, seed=options.seed))
    elif options.command == "rules":
        _list_rules(console, as_json=options.json)
    else:
        from rich.markdown import Markdown

        console.print(Markdown(rule_by_code(options.code).documentation()))
    return 0


def _list_rules(console: Console, *, as_json: bool) -> None:
    if as_json:
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
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("code", "name", "sign", "points to", "fires when"):
        table.add_column(heading)
    for rule in RULES:
        settings = rule()
        steps = f" for {settings.for_steps} steps" if settings.for_steps > 1 else ""
        table.add_row(rule.code, rule.name, rule.sign, rule.kind, f"value > {settings.limit:g}{steps}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
