"""`gradwatch explain`: one rule's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.rules import rule_by_code

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "explain"
HELP = "print one rule's page"
EXAMPLES = """\
  gradwatch explain GW203      meaning, formula, what to do, when it is harmless"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """See `gradwatch.commands.Command`."""
    parser.add_argument("code", metavar="CODE", help="such as GW203")


def run(options: argparse.Namespace, console: Console) -> int:
    """See `gradwatch.commands.Command`."""
    from rich.markdown import Markdown

    console.print(Markdown(rule_by_code(options.code).documentation()))
    return 0
