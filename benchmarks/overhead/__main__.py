"""What watching costs: ``python -m benchmarks.overhead``.

One process, one model, one optimizer; each variant is switched on and off block by block, in random order beside plain
steps, plain steps again (the noise) and steps with `clip_grad_norm_`. Ratios are those of blocks that stand side by side;
shown are their medians and quartiles. One thread, and the process's own clock, which other load does not move; on a CUDA
device the wall clock, with the device awaited at the end of each block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.overhead.bench import Bench, shown
from benchmarks.overhead.others import MISSING, OTHERS
from benchmarks.overhead.pages import write_overhead
from benchmarks.overhead.variants import LONGER, OWN, RARE, compare, device_counts, memory_of, parts_of
from benchmarks.overhead.workloads import WORKLOADS
from benchmarks.pages import ROOT, between_marks, markdown

CACHED = Path("build") / "overhead.json"  # a later run of some variants replaces theirs


def row_of(name: str, last: dict[str, Any]) -> list[str]:
    """Return a variant's row of the table."""
    own, clip = last["own"], last["clip own"]
    times = ["", ""] if own is None else [f"{1e6 * own:.0f}", f"{own / clip:.2f}"]
    return [name, *(shown(last[ratio]) for ratio in ("to plain", "to clip", "noise")), *times]


def medians_of(last: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a variant."""
    own = last["own"]
    return {
        "to plain": statistics.median(last["to plain"]),
        "to clip": statistics.median(last["to clip"]),
        "own": None if own is None else 1e6 * own,
        "own to clip": None if own is None else own / last["clip own"],
    }


def run_variants(options: argparse.Namespace, letter: str, table: Table) -> dict[str, Any]:
    """Run the variants of one workload, each on a model of its own; return medians."""
    here: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in progress.track(options.variants.split(","), description=f"({letter})"):
            bench = Bench(WORKLOADS[letter].make, fused=options.fused)
            bench.steps(2)
            seconds = options.seconds * (LONGER if name in RARE else 1)
            block = max(2, round(seconds / bench.steps(3)))
            try:
                last = compare(bench, name, options.rounds, block)
            except Exception as error:  # another's fault must not end the run
                if name in OWN:
                    raise
                table.add_row(name, f"failed: {type(error).__name__}: {str(error)[:50]}")
                continue
            table.add_row(*row_of(name, last))
            here[name] = medians_of(last)
            here["plain"], here["clip"] = 1e3 * last["plain"], statistics.median(last["clip to plain"])
        bench = Bench(WORKLOADS[letter].make, fused=options.fused)
        here["parts"] = parts_of(bench, 320 if letter in "ab" else 64)
    return here


def run(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Run what was asked for and print a table for each workload; return medians."""
    found: dict[str, dict[str, Any]] = {}
    for letter in options.workloads:
        workload = WORKLOADS[letter]
        table = Table(title=f"({letter}) {workload.title}", title_justify="left")
        for column in ("variant", "step / plain", "step / step with clip", "noise", "own us", "own / clip's own"):
            table.add_column(column)
        here = found[letter] = run_variants(options, letter, table)
        table.caption = (
            f"plain step {here['plain']:.3g} ms, with clip_grad_norm_ {here['clip']:.3f} of it; armed, in us: "
            + ", ".join(f"{name} {value:.0f}" for name, value in here["parts"].items())
        )
        if options.device == "cuda":
            here["device"] = device_counts(Bench(workload.make, fused=options.fused))
            table.caption += "; " + ", ".join(f"{name} {value:g}" for name, value in here["device"].items())
        if letter == "a":
            here["blocks"], here["growth"] = memory_of(Bench(workload.make, fused=options.fused), 5000)
            table.caption += (
                f"; a step leaves {here['blocks']:.2f} memory blocks behind, 1,000 steps {here['growth']:.1f} KB"
            )
        console.print(table)
    return found


def main() -> None:
    """Run and print."""
    names = [*OWN, *OTHERS]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.overhead", description="What watching costs, beside clip_grad_norm_ and others."
    )
    parser.add_argument("--workloads", default="abcdef", help="which of a to f")
    parser.add_argument("--variants", default=",".join(names), help="which of: " + ", ".join(names).replace("%", "%%"))
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a block")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    parser.add_argument("--device", default="cpu", help="where the models live: cpu or cuda")
    parser.add_argument("--scaling", action="store_true", help="cost by layers, parameters and steps done, instead")
    parser.add_argument("--forensics", action="store_true", help="what finding the operation costs, instead")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device != "cpu":  # as a default, it costs each call of torch some microseconds in Python
        torch.set_default_device(options.device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.device}, one thread of "
        f"{os.cpu_count()} cores, AdamW {'fused' if options.fused else 'foreach'}, {options.rounds} rounds"
    )
    console.print(f"{title}; median (quartiles)")
    if MISSING:
        console.print("not installed: " + ", ".join(MISSING) + "; pip install -e '.[bench]'")
    if options.scaling:
        from benchmarks.overhead import scaling  # its module for memory is not everywhere

        scaling.main(console, write=options.write)
        return
    if options.forensics:
        from benchmarks.overhead import forensics

        table = markdown(forensics.HEAD, forensics.rows(options.workloads, options.rounds, options.seconds))
        console.print(f"{forensics.NOTE}, {options.rounds} rounds")
        if options.write:
            between_marks(ROOT / "docs" / "forensics.md", "cost", table)
        return
    found = json.loads(CACHED.read_text()) if CACHED.exists() else {}
    for letter, here in run(options, console).items():
        found[letter] = {**found.get(letter, {}), **here}
    CACHED.parent.mkdir(exist_ok=True)
    CACHED.write_text(json.dumps(found, indent=1))
    if options.write:
        write_overhead(dict(sorted(found.items())), title)


if __name__ == "__main__":
    main()
