"""From a mark to the record that reports show."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.cells import called
from gradwatch.forensics.advice import advice_of, cause_of
from gradwatch.records import Origin
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.forensics.marks import Mark
    from gradwatch.records import Part, Way


def origin_of(mark: Mark, found_by: Way, *, batch: int = 0, part: Part | None = None) -> Origin:
    """Return the record of a mark."""
    place = mark.place
    if part is None:
        inside: Part = "unknown" if place.recomputed else "loss code"
        part = "optimizer" if mark.update else "model" if place.module is not None else inside
    return Origin(
        subject=mark.subject,
        op=mark.op,
        direction="update" if part == "optimizer" else "backward" if mark.backward else "forward",
        part=part,
        node=mark.node,
        module=place.module,
        file=called(place.file),
        line=place.line,
        calls_model=place.calls_model,
        name=mark.name,
        inputs=mark.inputs,
        output=mark.output,
        rows=mark.rows if mark.rows_known else (),
        batch=batch,
        cause=_held(mark) if mark.subject in ("input", "argument") else cause_of(mark),
        advice=advice_of(mark),
        found_by=found_by,
    )


def _held(mark: Mark) -> str:
    """Return what an input held, such as "1 NaN"."""
    if not mark.inputs:
        return "a value that is not finite"
    one = mark.inputs[0]
    parts = [counted(number, noun) for number, noun in ((one.nans, "NaN"), (one.infs, "infinity")) if number]
    return " and ".join(parts) or "a value that is not finite"


def called_at(origin: Origin, file: str, line: int) -> Origin:
    """Return the record with the line that called the model, if no line further inside is known."""
    if origin.file or not line or origin.module is None:
        return origin
    return replace(origin, file=called(file), line=line, calls_model=True)


def sole(marks: Sequence[Mark]) -> Mark | None:
    """Return the first of some marks if they are all of one origin; None if it is not known which of them counts."""
    counting = [mark for mark in marks if not mark.mute] or list(marks)
    if not counting:
        return None
    return counting[0] if len({mark.key for mark in counting}) == 1 else None


def lines_of(origin: Origin) -> list[str]:
    """Return the finding as lines: what happened, the inputs, what to do."""
    return [str(origin), *(f"  {line}" for line in origin.details), *(f"  do: {line}" for line in origin.advice)]
