"""`gradwatch watch`: shows the live view of a training in another process."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.commands.keyboard import Keys
from gradwatch.commands.values import a_path
from gradwatch.errors import RunLogError, UsageError
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.runlog import RunLog
from gradwatch.runlog.latest import snapshot_of
from gradwatch.runlog.state import state_of

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from rich.console import Console, RenderableType

    from gradwatch.records import Floats, Snapshot
    from gradwatch.reports.watching import Watching

NAME = "watch"
HELP = "show the live view of a training in another process on this machine"
EXAMPLES = """\
  gradwatch watch runs/today

keys: arrows or j and k select a layer; l, n and g sort the layers by closeness to their limits, by norm, by growth;
i lists the incidents; space pauses; q quits"""
_EVERY = 0.4  # seconds between two reads of the log
_ROWS = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    parser.add_argument(
        "run_log", metavar="RUN", type=a_path, help="the folder of a run log, such as runs/today; it may not exist yet"
    )


def run(options: argparse.Namespace, console: Console) -> int:
    """Show the live view until the user quits; return the exit code."""
    if not console.is_terminal:
        raise UsageError(
            "gradwatch watch draws in a terminal, but standard output is not a terminal. Use gradwatch report."
        )
    from gradwatch.reports.watching import Watching

    asked: list[int] = []  # signals received: recorded, not raised, so that the terminal is always restored
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGTSTP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: asked.append(number))
    watching = Watching()
    while not watching.over:
        _follow(options.run_log, watching, console, asked)
        if asked and asked[0] != getattr(signal, "SIGTSTP", None):
            return 0 if asked[0] == signal.SIGINT else 128 + asked[0]
        if asked:  # Ctrl-Z: stop now that the terminal is restored, and continue when the shell resumes the process
            asked.clear()
            os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def _follow(path: Path, watching: Watching, console: Console, asked: list[int]) -> None:
    """Draw until the user quits or a signal is received."""
    from rich.live import Live

    def picture() -> RenderableType:
        return watching.picture(console.width, console.height)

    looked, size = -np.inf, console.size
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False, get_renderable=picture) as live:
        while not (watching.over or asked):
            now = time.monotonic()
            fresh = now - looked >= _EVERY
            if fresh:
                _look(path, watching)
                looked = now
            typed = keys.wait(0.1)
            for key in typed:
                watching.key(key)
            if fresh or typed or console.size != size:
                size = console.size
                live.refresh()


def _look(path: Path, watching: Watching) -> None:
    """Read the latest snapshot; the log is opened anew each time, since it may be created, removed or replaced."""
    try:
        with RunLog(path) as log:
            snapshot = snapshot_of(log)
            watching.show(snapshot, _growth(log, snapshot), f"{state_of(log)} · {path}")
    except RunLogError as error:
        watching.wait_for(str(error))


def _growth(log: RunLog, snapshot: Snapshot) -> Floats:
    """Return each layer's gradient norm divided by its median over the last 64 rows, shape (L,)."""
    _, norms = log.norms(last=_ROWS)
    with ignore_fp_warnings():
        known = np.where(np.isfinite(norms), norms, np.nan).astype(np.float64)
        middle = np.full(len(log.layers), np.nan)
        seen = ~np.isnan(known).all(axis=0)
        middle[seen] = np.nanmedian(known[:, seen], axis=0)
        growth: Floats = snapshot.grad_norm / middle
    return growth
