"""All programs of the fault set, and the half that each belongs to."""

from __future__ import annotations

import argparse
import importlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.faults.program import Program

Half = Literal["development", "report"]
_FOLDERS = ("faulty", "healthy", "rare")
SPLIT = Path(__file__).with_name("split.json")
LABELS = Path(__file__).with_name("labels.json")


def _all() -> tuple[Program, ...]:
    """Return all programs in the order of their labels, in whatever file they stand; those without labels come last."""
    found: list[Program] = []
    for folder in _FOLDERS:
        for file in sorted(Path(__file__).with_name(folder).glob("[!_]*.py")):
            module = importlib.import_module(f"benchmarks.faults.{folder}.{file.stem}")
            found += getattr(module, "PROGRAMS", ())
    names = [program.name for program in found]
    assert len(set(names)) == len(names), f"twice: {sorted({name for name in names if names.count(name) > 1})}"
    labelled = json.loads(LABELS.read_text()) if LABELS.exists() else {}
    place = {name: index for index, name in enumerate(labelled)}
    return tuple(sorted(found, key=lambda program: place.get(program.name, len(place))))


PROGRAMS = _all()


def draw(drawn: dict[str, Half]) -> dict[str, Half]:
    """Draw the halves of the programs that have none: faulty and healthy ones apart, those with a metric by pairs of kin."""
    generator = random.Random(f"gradwatch {len(drawn)}" if drawn else "gradwatch")
    halves = dict(drawn)
    pair: list[Half] = []
    for program in PROGRAMS:
        if program.metric and program.name not in drawn:
            if not pair:
                pair = ["development", "report"]
                generator.shuffle(pair)
            halves[program.name] = pair.pop()
    for faulty in (True, False):
        new = [program for program in PROGRAMS if program.name not in halves]
        names = sorted(program.name for program in new if (program.twin is not None) is faulty)
        generator.shuffle(names)
        for place, name in enumerate(names):
            halves[name] = "development" if place < len(names) / 2 else "report"
    return halves


def halves() -> dict[str, Half]:
    """Return each program's half as it was drawn once and written down."""
    found: dict[str, Half] = json.loads(SPLIT.read_text())
    return found


def main() -> None:
    """Draw the halves that are missing and write them down; a program that has a half keeps it."""
    argparse.ArgumentParser(
        "python -m benchmarks.faults.programs", description="Draw the halves of the programs that have none."
    ).parse_args()
    SPLIT.write_text(json.dumps(draw(halves() if SPLIT.exists() else {}), indent=1) + "\n")


if __name__ == "__main__":
    main()
