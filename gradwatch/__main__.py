"""The command line; `gradwatch ...` is the same as `python -m gradwatch ...`."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from gradwatch import __version__
from gradwatch.commands import COMMANDS
from gradwatch.commands.streams import console_on, standard_streams
from gradwatch.errors import GradwatchError
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """examples:
  gradwatch demo                              a training that explodes, watched, then saved by auto-clip
  gradwatch watch runs/today                  the live view of a training in another process
  gradwatch report runs/today                 what happened, in the terminal
  gradwatch report runs/today --html r.html   the same as one page that opens offline
  gradwatch report runs/today --check         for CI: exit code 1 unless the verdict is healthy
  gradwatch replay runs/today --rule GW301.limit=30
  gradwatch explain GW203                     one sign: meaning, formula, what to do, when it is harmless

exit codes: 0 done; 1 `report --check` found a run whose verdict is not healthy, or `blame` a
number that is not finite; 2 bad usage, or a run log that cannot be read"""


class Parser(argparse.ArgumentParser):
    """One whose errors, which repeat what was typed, are fit to be printed."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        super().error(printable(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, which says the same whoever reads, in whatever encoding."""
    with standard_streams():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="gradwatch",
        description="Training-stability diagnostics for PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gradwatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        one = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(one)
        one.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        code = int(options.run(options, console_on()))
        sys.stdout.flush()
    except (GradwatchError, OSError) as error:  # such as a disk that is full
        with suppress(OSError):  # which may be on the same full disk
            sys.stderr.write(printable(f"gradwatch: {error}") + "\n")
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
