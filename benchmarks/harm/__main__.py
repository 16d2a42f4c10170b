"""Measure the effect of auto-clip on healthy programs whose signal is rare or bursty: ``python -m benchmarks.harm``.

Each program is run over five seeds (unwatched, only watched, and with auto-clip by norm and by value, as on the CPU and as on a
device) and judged on held-out data. Finished runs are kept below ``build/``, like those of `benchmarks.repair`, which uses the
same programs as healthy ones.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.device_path import on_device
from benchmarks.faults.programs import halves
from benchmarks.harm.judging import RARE, check_watching, methods, row_of, summary, told
from benchmarks.pages import ROOT, between_marks, markdown
from benchmarks.repair.methods import NOTHING, WATCHED
from benchmarks.repair.runs import run_all

if TYPE_CHECKING:
    from benchmarks.repair.runs import Job


def main() -> None:
    """Run the programs and print the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.harm",
        description="Measure the effect of auto-clip on healthy programs whose signal is rare.",
    )
    parser.add_argument("--write", action="store_true", help="write the table to docs/repair.md")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="run only programs whose name contains this; can be repeated"
    )
    parser.add_argument("--half", choices=("development", "report", "both"), default="both")
    parser.add_argument("--clip", choices=("norm", "value", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.write and (options.only, options.half, options.clip, options.seeds) != (None, "both", "both", 5):
        parser.error("--write needs all programs, both halves, both clips and five seeds")
    chosen = ("norm", "value") if options.clip == "both" else (options.clip,)
    clips = (*chosen, *map(on_device, chosen))
    programs = [
        program
        for program in RARE
        if options.half in ("both", halves()[program.name])
        and (options.only is None or any(part in program.name for part in options.only))
    ]
    if not programs:
        parser.error(f"no program is called {options.only} in this half; there are: {', '.join(p.name for p in RARE)}")
    console = Console()
    seeds = range(options.seeds)
    jobs: list[Job] = [
        ("fault", program.name, method, seed)
        for program in programs
        for method in (NOTHING, WATCHED, *methods(clips))
        for seed in seeds
    ]
    results = run_all(jobs, console, "rare signals")
    check_watching(results, programs, options.seeds)
    head = ["", "half", "alarms", f"steps touched by {'; '.join(clips)}", f"loss: unwatched; {'; '.join(clips)}"]
    head += [f"metric: unwatched; {'; '.join(clips)}", *(f"worse by {clip}" for clip in clips)]
    table = markdown(head, [row_of(results, program, clips, options.seeds) for program in programs])
    lines = summary(results, programs, clips, options.seeds)
    first = told(results, programs, options.seeds)
    for text in (table, *lines, *first):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.write:
        text = "\n".join(f"* {line}" for line in lines)
        text += f"\n\n{table}\n\nThe first alarm of each program that has one:\n\n"
        text += "\n".join(f"* {line}" for line in first or ["none"])
        between_marks(ROOT / "docs" / "repair.md", "rare", text)


if __name__ == "__main__":
    main()
