"""Print what gradwatch says, as real trainings produce it: ``python -m benchmarks.sentences``.

Finished runs are kept below ``build/`` until the sources change.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.pages import ROOT
from benchmarks.runs import digest, kept_at, run_missing
from benchmarks.sentences.listening import form_of, listen
from benchmarks.sentences.trainings import trainings
from gradwatch.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.sentences.listening import Said

_SECTIONS = {
    "findings": "Evidence that is no rule's",
    "incidents": "Incidents",
    "auto-clip": "What auto-clip did",
    "norm and clip": "Is this norm normal, and what does my clip do?",
    "notes": "Notes",
    "errors": "Errors",
    "summary": "The first line of the summary, and its remarks",
}


def _do(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return dict(listen(trainings()[name]))


def lines_of(results: Mapping[str, Said], most: int) -> Iterator[str]:
    """Yield the page: under each heading at most ``most`` lines, those of different trainings first."""
    for rule in RULES:
        yield from _section(f"{rule.code} {rule.name}", results, f"rule {rule.code}", most)
    for kind in sorted({section for said in results.values() for section in said if section.startswith("advice")}):
        yield from _section(f"Advice for {kind.removeprefix('advice: ')}", results, kind, 3 * most)
    for section, heading in _SECTIONS.items():
        yield from _section(heading, results, section, 3 * most)
    told = {section for said in results.values() for section in said}
    silent = [f"{rule.code} {rule.name}" for rule in RULES if f"rule {rule.code}" not in told]
    yield f"No training made these rules say anything: {', '.join(silent)}." if silent else "Every rule said something."


def _section(heading: str, results: Mapping[str, Said], section: str, most: int) -> Iterator[str]:
    said = {name: lines[section] for name, lines in results.items() if section in lines}
    if not said:
        return
    yield f"## {heading}"
    for line, name in _in_turn(said)[:most]:
        yield from textwrap.wrap(f"* {line}", 118, subsequent_indent="  ", break_long_words=False)
        yield f"      [{name}]"
    yield ""


def _in_turn(said: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Return the lines with the training that said them: each form once, then the others; the first of each training first."""
    rounds = range(max(map(len, said.values())))
    found = [(lines[place], name) for place in rounds for name, lines in said.items() if place < len(lines)]
    forms = {form_of(line): (line, name) for line, name in reversed(found)}
    return [one for one in found if one in forms.values()] + [one for one in found if one not in forms.values()]


def main() -> None:
    """Run the trainings and print the page."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.sentences", description="Print what gradwatch says, as real trainings produce it."
    )
    parser.add_argument("--most", type=int, default=4, help="sentences of each rule; three times as many elsewhere")
    parser.add_argument("--only", metavar="NAME", help="run only trainings whose name contains this")
    options = parser.parse_args()
    names = [name for name in trainings() if options.only is None or options.only in name]
    if not names:
        parser.error(f"no training is called {options.only}; there are: {', '.join(trainings())}")
    folder = ROOT / "build" / "sentences" / digest("gradwatch", "benchmarks/faults", "benchmarks/sentences")
    files = {name: kept_at(folder, name) for name in names}
    results = run_missing(_do, files, Console(stderr=True), "trainings")
    print("\n".join(lines_of({name: results[name] for name in names}, options.most)))


if __name__ == "__main__":
    main()
