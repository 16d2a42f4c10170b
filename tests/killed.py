"""Runs that are killed: ``python -m tests.killed FOLDER COUNT`` prints what their logs still held, as JSON.

Each is a process that judges and logs a row a millisecond, killed at a random moment. They are forked, so that fifty of
them take seconds.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np

from gradwatch.errors import RunLogError
from gradwatch.history.history import History
from gradwatch.pipeline import Pipeline
from gradwatch.records import Provenance, Row
from gradwatch.reports.notes import Notes
from gradwatch.rules import default_rules
from gradwatch.runlog import RunLog
from gradwatch.runlog.recording import Recording, columns_of
from gradwatch.runlog.store import Store

LAYERS = 40
_ROW = struct.Struct("d")


def numbers(step: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the gradient norms that a step has, so that they can be told from any others."""
    return 1.0 + (step % 97) / 100 + np.arange(LAYERS) / 1000


def live(folder: Path, clock: mmap.mmap) -> None:
    """Log rows until the end comes."""
    history = History([f"layers.{n}.weight" for n in range(LAYERS)])
    pipeline = Pipeline(history, default_rules(), None, [], Notes(strict=True))
    pipeline.desk.keep(Recording(Store(folder, columns_of(history), {}, history.facts), history, lambda _: None))
    pipeline.desk.start()
    for step in range(len(clock) // _ROW.size):
        norms = numbers(step)
        weights = np.ones(LAYERS) if step % 32 == 31 else None
        norm = float(np.sqrt(np.dot(norms, norms)))
        row = Row(step, 1.0 / (1 + step), norms, norm, weights, provenance=Provenance("written", loss="written"))
        pipeline.done(row, pipeline.judge(row), 1.0)
        _ROW.pack_into(clock, step * _ROW.size, time.monotonic())
        time.sleep(0.001)


def _fail(part: str, error: Exception) -> None:
    raise AssertionError(part) from error


def kill(folders: list[Path], lives: list[float]) -> list[dict[str, object]]:
    """Run one process for each folder at the same time; kill each after its seconds; say what is left."""
    clocks = [mmap.mmap(-1, 4000 * _ROW.size) for _ in folders]
    started = time.monotonic()
    children = []
    for folder, clock in zip(folders, clocks, strict=True):
        child = os.fork()
        if not child:
            live(folder, clock)
            os._exit(0)
        children.append(child)
    found: list[dict[str, object]] = [{} for _ in folders]
    for place in sorted(range(len(folders)), key=lives.__getitem__):
        time.sleep(max(0.0, started + lives[place] - time.monotonic()))
        os.kill(children[place], signal.SIGKILL)
        killed = time.monotonic()
        os.waitpid(children[place], 0)
        times = [time_ for (time_,) in struct.iter_unpack("d", clocks[place]) if time_]
        found[place] = {"made": len(times), "due": sum(time_ < killed - 1.0 for time_ in times)}
    for place, folder in enumerate(folders):
        found[place] |= left(folder)
    return found


def left(folder: Path) -> dict[str, object]:
    """Return how many rows a log holds, and whether each is whole."""
    try:
        log = RunLog(folder)
    except RunLogError as error:  # killed before the file was made
        early = "There is no run log" in str(error) or "holds nothing yet" in str(error)
        return {"kept": 0, "whole": early, "why": str(error)}
    with log:
        series = log.series()
        steps, norms = log.norms()
        whole = (
            series.step.tolist() == list(range(len(series.step)))
            and np.array_equal(series.loss, 1.0 / (1 + series.step))
            and steps.tolist() == series.step.tolist()
            and np.allclose(norms, [numbers(step) for step in steps.tolist()] or np.zeros((0, LAYERS)), rtol=1e-6)
            and log._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        )
        return {"kept": len(series.step), "whole": whole}


def main() -> None:
    """Kill as many as asked for, ten at a time."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    lives = np.random.default_rng().uniform(0.02, 1.8, count).tolist()
    folders = [folder / str(number) for number in range(count)]
    found = [one for n in range(0, count, 10) for one in kill(folders[n : n + 10], lives[n : n + 10])]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
