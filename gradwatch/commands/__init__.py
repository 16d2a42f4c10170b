"""One command of the command line a file: its arguments, its help with examples, and what it does.

A new command is one new file and one line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gradwatch.commands import compare, demo, explain, export, list_, replay, report, rules, suggest, watch

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


class Command(Protocol):
    """What each of the files has. ``HELP`` is one line, ``EXAMPLES`` are shell lines."""

    NAME: str
    HELP: str
    EXAMPLES: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Name the arguments."""

    def run(self, options: argparse.Namespace, console: Console) -> int:
        """Do it; return the exit code."""


COMMANDS: tuple[Command, ...] = (demo, watch, report, replay, compare, list_, export, suggest, rules, explain)

__all__ = ["COMMANDS", "Command"]
