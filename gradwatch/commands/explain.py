"""`gradwatch explain`: the page of a rule, or of the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.rules import rule_by_code
from gradwatch.verdict import VerdictSettings

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

NAME = "explain"
HELP = "print the page of a rule, or of the verdict"
EXAMPLES = """\
  gradwatch explain GW203      meaning, formula, what to do, when it is harmless
  gradwatch explain verdict    when signs become an incident, and when it closes"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("code", metavar="CODE", help="the code of a rule, such as GW203, or verdict")


def run(options: argparse.Namespace, console: Console) -> int:
    """Print a page; return the exit code."""
    from rich.markdown import Markdown

    explained = VerdictSettings if options.code.lower() == "verdict" else rule_by_code(options.code)
    console.print(Markdown(explained.documentation()))
    return 0
