"""Plain log lines, written only when there is news."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from gradwatch.reports.base import Report
from gradwatch.reports.unsaid import unsaid
from gradwatch.text.printable import printable, writable

if TYPE_CHECKING:
    from gradwatch.records import Incident, Snapshot


class LogReport(Report):
    """Writes lines when an incident opens, changes or closes, with its evidence and advice, and the summary at the end.

    Args:
        stream: stream to write to; None: the standard error stream at the time of writing.
    """

    shows_notes: ClassVar[bool] = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._notes = 0
        self._said: dict[int, set[str]] = {}
        self._advised: dict[str, int] = {}

    def start(self) -> None:
        """Forget what was written in an earlier run."""
        self._notes, self._said, self._advised = 0, {}, {}

    def step(self, snapshot: Snapshot) -> None:
        """Write the notes and the lines of changed incidents that have not been written yet."""
        lines = [f"note: {note}" for note in snapshot.notes[self._notes :]]
        self._notes = len(snapshot.notes)
        for incident in snapshot.news:
            said = self._said.setdefault(incident.opened_step, set())
            new = [line for line in incident_lines(incident, self._advised) if line not in said]
            said.update(new)
            lines += new
        name = f"{snapshot.facts.name} | " if snapshot.facts.name else ""
        for line in lines:
            self._write(f"gradwatch | {name}step {snapshot.step} | {line}")

    def close(self, snapshot: Snapshot) -> None:
        """Write the summary, unless no step was made."""
        if snapshot.step < 0:
            return
        from gradwatch.reports.summary import Summary  # rich is loaded only when something is shown

        for line in str(Summary(snapshot)).splitlines():
            self._write(line)

    def _write(self, text: str) -> None:
        write_line(text, self._stream)


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write one line to ``stream``, or to the current standard error stream (above a tqdm bar, if there is one) if None.

    Characters that are not printable, or that the stream cannot encode, are escaped. Errors of the standard error stream, which
    may be closed, a broken pipe or an object that has only ``write``, are ignored: the line is lost. Errors of a given
    ``stream`` are raised.
    """
    if stream is not None:
        _write(text, stream)
        return
    try:
        if sys.stderr is not None:  # None in a program without a console
            _write(text, sys.stderr, tqdm=sys.modules.get("tqdm"))
    except Exception:
        return  # there is nowhere to report this


def _write(text: str, stream: Any, tqdm: Any = None) -> None:
    text = writable(printable(text), getattr(stream, "encoding", None))
    if tqdm is not None:
        tqdm.tqdm.write(text, file=stream)
    else:
        stream.write(text + "\n")
    flush = getattr(stream, "flush", None)
    if flush is not None:
        flush()


def incident_lines(incident: Incident, advised: dict[str, int] | None = None) -> list[str]:
    """Return the incident as printable lines: headline, evidence and advice if it is open, and what auto-clip did.

    Advice that ``advised`` holds, by text with the step of the incident on which it was given, is not repeated but referred to;
    what is new is added to it.
    """
    lines = [str(incident)]
    if incident.open:
        lines += [f"  {line}" for line in incident.told]
        lines += [f"  do: {line}" for line in unsaid(incident, {} if advised is None else advised)]
    if incident.clip is not None:
        lines.append(f"  auto-clip: {incident.clip}")
    return [printable(line) for line in lines]
