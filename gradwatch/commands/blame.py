"""`gradwatch blame`: runs a script and names the operation that makes the first number that is not finite."""

from __future__ import annotations

import argparse
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from gradwatch.commands.values import a_path
from gradwatch.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

NAME = "blame"
HELP = "run a script and name the operation that makes the first NaN or infinity"
EXAMPLES = """\
  gradwatch blame train.py --epochs 3       every operation is watched: a step takes 1.4 to 5 times as long
  gradwatch blame -m package.train          a module"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module instead of a script")
    parser.add_argument("script", metavar="SCRIPT", nargs="?", type=a_path, help="a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the script and print the finding; return 1 if there is one."""
    from gradwatch.forensics import Watch

    started, watch = perf_counter(), Watch(None)
    try:
        with watch.running():
            _run(options)
    except NonFiniteError as error:
        if error is not watch.finding:
            raise
    except SystemExit as end:
        if watch.finding is None and end.code not in (None, 0):
            raise
    taken = f"{watch.steps:,} optimizer steps, {perf_counter() - started:.1f} s"
    _show(console, [f"gradwatch blame: {watch.finding or 'every loss, gradient and weight was finite'}", f"  {taken}"])
    return 0 if watch.finding is None else 1


def _show(console: Console, lines: list[str]) -> None:
    from gradwatch.reports.line import Line

    for line in "\n".join(lines).splitlines():
        console.print(Line(line))


def _run(options: argparse.Namespace) -> None:
    if options.module is not None:
        given = ([str(options.script)] if options.script is not None else []) + options.arguments
        with _as_main([options.module, *given], Path.cwd()):
            runpy.run_module(options.module, run_name="__main__", alter_sys=True)
        return
    if options.script is None:
        raise UsageError("gradwatch blame got no script; expected the path of a Python file, or -m and a module.")
    if not options.script.is_file():
        raise UsageError(f"gradwatch blame found no file {options.script}; expected the path of a Python file.")
    with _as_main([str(options.script), *options.arguments], options.script.parent.resolve()):
        runpy.run_path(str(options.script), run_name="__main__")


@contextmanager
def _as_main(words: list[str], folder: Path) -> Iterator[None]:
    """Set the arguments and the first folder of imports as Python does."""
    before, path = sys.argv, sys.path[:]
    sys.argv, sys.path[0:0] = words, [str(folder)]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path
