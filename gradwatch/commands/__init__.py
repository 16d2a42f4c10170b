"""The commands of the command line, one module each: its arguments, its help with examples, and what it does.

To add a command, add a module and an entry in `COMMANDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gradwatch.commands import (
    blame,
    compare,
    demo,
    explain,
    export,
    list_,
    replay,
    report,
    reproduce,
    rules,
    suggest,
    watch,
)

if TYPE_CHECKING:
    import argparse

    from rich.console import Console


class Command(Protocol):
    """The attributes of a command's module. ``HELP`` is one line, ``EXAMPLES`` are shell commands."""

    NAME: str
    HELP: str
    EXAMPLES: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command to ``parser``."""

    def run(self, options: argparse.Namespace, console: Console) -> int:
        """Run the command and return the exit code."""


COMMANDS: tuple[Command, ...] = (
    demo,
    watch,
    report,
    blame,
    reproduce,
    replay,
    compare,
    list_,
    export,
    suggest,
    rules,
    explain,
)

__all__ = ["COMMANDS", "Command"]
