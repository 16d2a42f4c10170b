"""What a run log costs: ``python -m benchmarks.run_log``.

The time of a step with and without it, at 150 layers and about 20 ms, and the size of a log of 300 layers and a million
steps. Times are those of the whole process, so that the thread that writes is in them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.overhead.bench import shown
from benchmarks.run_log.cost import overhead, own, size
from gradwatch.runlog import RunLog


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run_log", description="What a run log costs, in time and on the disk."
    )
    parser.add_argument("--rounds", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=60, help="steps of a block")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the log whose size is taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    ratios, noise, step = overhead(options.rounds, options.block)
    console.print(
        f"150 layers, armed step {step:.2f} ms: with a log {shown(ratios)} of it, without one again {shown(noise)}"
    )
    mine, writers = own(options.block * options.rounds)
    console.print(
        f"the log's own time for a step: {mine:.0f} us in the training's thread, {writers:.0f} us in the one that writes"
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = size(Path(folder), 300, options.rows)
        megabytes = (Path(folder) / "run.sqlite").stat().st_size / 1e6
        with RunLog(folder) as log:
            kept = len(log.norms()[0])
    console.print(
        f"300 layers, {options.rows:,} steps: {megabytes:,.0f} MB, {kept:,} rows with layers; written in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
