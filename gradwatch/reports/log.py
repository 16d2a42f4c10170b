"""Plain log lines, only on change."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from gradwatch.printable import printable, writable
from gradwatch.reports.base import Report

if TYPE_CHECKING:
    from gradwatch.records import Incident, Snapshot


class LogReport(Report):
    """One line when an incident opens, changes or closes, with its evidence and advice; the summary at the end.

    Args:
        stream: where to write; None is the standard error stream of that moment.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._notes = 0
        self._said: dict[int, set[str]] = {}

    def start(self) -> None:
        """Begin anew."""
        self._notes, self._said = 0, {}

    def step(self, snapshot: Snapshot) -> None:
        """Write what is new."""
        lines = [f"note: {note}" for note in snapshot.notes[self._notes :]]
        self._notes = len(snapshot.notes)
        for incident in snapshot.news:
            said = self._said.setdefault(incident.opened_step, set())
            new = [line for line in incident_lines(incident) if line not in said]
            said.update(new)
            lines += new
        for line in lines:
            self._write(f"gradwatch | step {snapshot.step} | {line}")

    def close(self, snapshot: Snapshot) -> None:
        """Write the summary, if there is anything to tell."""
        if snapshot.step < 0:
            return
        from gradwatch.reports.summary import Summary  # rich is loaded only when something is shown

        for line in str(Summary(snapshot)).splitlines():
            self._write(line)

    def _write(self, text: str) -> None:
        write_line(text, self._stream)


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write a line to ``stream``; None is the standard error stream of this moment, above a tqdm bar if there is one.

    Whatever it is made of, it is one line of characters that the stream can take. The standard error stream may be closed, a
    pipe that nobody reads any more, or an object with ``write`` alone: what it does not take is lost, and the next line is
    tried anew. A stream that was named raises.
    """
    if stream is not None:
        _write(text, stream)
        return
    try:
        if sys.stderr is not None:  # it is in a program without a console
            _write(text, sys.stderr, tqdm=sys.modules.get("tqdm"))
    except Exception:
        return  # there is no place left to say so


def _write(text: str, stream: Any, tqdm: Any = None) -> None:
    text = writable(printable(text), getattr(stream, "encoding", None))
    if tqdm is not None:
        tqdm.tqdm.write(text, file=stream)
    else:
        stream.write(text + "\n")
    flush = getattr(stream, "flush", None)
    if flush is not None:
        flush()


def incident_lines(incident: Incident) -> list[str]:
    """Return the incident as lines fit to be printed: headline, evidence, what auto-clip did, what to do."""
    lines = [str(incident)]
    if incident.open:
        lines += [f"  {line}" for line in incident.evidence]
        lines += [f"  do: {line}" for line in incident.advice]
    if incident.clip is not None:
        lines.append(f"  auto-clip: {incident.clip}")
    return [printable(line) for line in lines]
