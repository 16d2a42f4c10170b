"""Which operation made the first NaN, said by gradwatch and by other tools: ``python -m benchmarks.forensics``."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.forensics import causes
from benchmarks.forensics.healthy import healthy_told
from benchmarks.forensics.processes import in_processes
from benchmarks.forensics.programs import PROGRAMS, Program
from benchmarks.forensics.tools import TOOLS, said
from benchmarks.pages import ROOT, between_marks, markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = ("op", "module", "line", "direction", "rows")
RIGHT, WRONG, UNKNOWN = "✓", "wrong", "·"


def judged(program: Program, told: dict[str, Any]) -> dict[str, str]:
    """Return for each column whether what a tool said is right, wrong or not said; empty where nothing could be said."""
    cause = program.cause
    assert cause is not None
    found: dict[str, str] = {}
    for column in COLUMNS:
        value = told[column]
        if column == "line":
            right = value in cause.lines and Path(str(told["file"])) == Path(causes.__file__)
            right = right or (program.name.startswith("HF") and str(told["file"]).endswith("modeling_gpt2.py"))
        elif column == "rows":
            right = tuple(value or ()) == cause.rows
            if (
                not cause.rows
                or program.processes > 1
                or program.name.startswith(("accumulation", "LSTM", "two forwards"))
            ):
                found[column] = WRONG if value and tuple(value) != cause.rows else ""
                continue
        else:
            right = value == (program.module if column == "module" else getattr(cause, column))
        if column == "module" and program.module is None:
            found[column] = WRONG if value else ""
        else:
            found[column] = RIGHT if right and told["found"] else UNKNOWN if value is None else WRONG
    return found


def row_of(program: Program, results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a program's row of the table."""
    cells = []
    for told in results.values():
        marks = judged(program, told)
        cells.append(" ".join(mark or "-" for mark in marks.values()) if told["found"] else "nothing")
    return [program.name, program.cause.op if program.cause else "", *cells]


def shares(
    programs: Sequence[Program], results: dict[str, dict[str, dict[str, Any]]], tools: Sequence[str]
) -> list[list[str]]:
    """Return for each tool and column how many programs it names rightly, and how many names are wrong."""
    rows = []
    for tool in tools:
        marks = [judged(one, results[key_of(one)][tool]) for one in programs]
        cells = []
        for column in COLUMNS:
            asked = [mark[column] for mark in marks if mark[column]]
            cells.append(f"{asked.count(RIGHT)} of {len(asked)}" if asked else "-")
        wrong = sum(mark[column] == WRONG for mark in marks for column in COLUMNS)
        rows.append([tool, *cells, str(wrong)])
    return rows


def key_of(program: Program) -> str:
    """Return the key of a program in the results."""
    return f"{program.group}: {program.name}"


def run(programs: Sequence[Program], tools: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Run the programs under the tools."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for program in track(programs, console=Console(stderr=True), transient=True):
        here = results[key_of(program)] = {}
        for tool in tools:
            if program.processes > 1:
                here[tool] = in_processes(program.name, tool, program.processes)
            else:
                here[tool] = said(program, tool)
    return results


def pages_of(programs: Sequence[Program], tools: Sequence[str]) -> str:
    """Run everything and return the tables."""
    results = run(programs, tools)
    parts = []
    for group in dict.fromkeys(one.group for one in programs if one.cause is not None):
        here = [one for one in programs if one.group == group]
        parts.append(f"{len(here)} programs, {group}:")
        parts.append(markdown(["", *COLUMNS, "wrong"], shares(here, results, tools)))
        parts.append(markdown(["", "operation", *tools], [row_of(one, results[key_of(one)]) for one in here]))
    healthy = [one for one in programs if one.cause is None]
    if healthy:
        said_of = {tool: sum(results[key_of(one)][tool]["found"] for one in healthy) for tool in tools}
        told = ", ".join(f"{tool} {count}" for tool, count in said_of.items())
        parts.append(f"{len(healthy)} healthy programs with masks and dropped branches, findings: {told}.")
    return "\n\n".join(parts)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.forensics", description="Which operation made the first NaN."
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only programs whose name contains this")
    parser.add_argument("--tools", default=",".join(TOOLS), help="which of: " + ", ".join(TOOLS))
    parser.add_argument("--write", action="store_true", help="write the tables to docs/forensics.md")
    parser.add_argument(
        "--healthy",
        action="store_true",
        help="count investigations of the healthy programs of the fault set instead; with --write into the same page",
    )
    options = parser.parse_args()
    if options.healthy:
        text = healthy_told(Console(stderr=True), options.only)
        print(text)
        if options.write:
            between_marks(ROOT / "docs" / "forensics.md", "healthy", text)
        return
    torch.set_num_threads(1)
    tools = [one for one in TOOLS if one in options.tools]
    if find_spec("transformers") is None:
        tools = [one for one in tools if one != "DebugUnderflowOverflow"]
        print("transformers is not installed: its debugger and its trainer are left out")
    programs = [one for one in PROGRAMS if options.only is None or any(part in one.name for part in options.only)]
    text = pages_of(programs, tools)
    print(text)
    if options.write:
        between_marks(ROOT / "docs" / "forensics.md", "forensics", text)


if __name__ == "__main__":
    main()
