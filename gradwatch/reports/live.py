"""The live view in a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from gradwatch.reports.base import Report
from gradwatch.reports.log import LogReport, write_line
from gradwatch.reports.screen import Screen, screen_for
from gradwatch.reports.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console

    from gradwatch.records import Snapshot


class LiveReport(Report):
    """Draws a `View` at the foot of the terminal, while ``print``, loggers and progress bars keep working above it.

    The training thread only stores a snapshot, which a separate thread draws. Several runs on one terminal share one picture, one
    below the other. At the end of a run its summary takes the place of its part. If the picture cannot be drawn, or another live
    display starts, the report says so and writes log lines instead.

    Args:
        console: console to draw on; None: the standard error stream.
    """

    period: ClassVar[float] = 0.2

    def __init__(self, console: Console | None = None) -> None:
        self._given = console
        self._begin()

    def _begin(self) -> None:
        self._screen: Screen | None = None
        self._instead: LogReport | None = None

    def start(self) -> None:
        """Take part in the picture, or fall back to log lines."""
        self._begin()
        found = screen_for(self._given)
        if isinstance(found, str):
            self._fall_back(found)
        else:
            self._screen = found
            found.join(self)

    def step(self, snapshot: Snapshot) -> None:
        """Store the snapshot for the drawing thread."""
        if self._instead is None and self._gave_way():
            snapshot = replace(snapshot, news=tuple(incident for incident in snapshot.incidents if incident.open))
        if self._instead is not None:
            self._instead.step(snapshot)
        elif self._screen is not None:
            self._screen.show(self, snapshot)

    def close(self, snapshot: Snapshot) -> None:
        """Replace the picture of this run by its summary."""
        self._gave_way()
        if self._screen is not None:
            shown = Summary(snapshot) if snapshot.step >= 0 and self._instead is None else None
            self._screen.leave(self, shown)
        if self._instead is not None:
            self._instead.close(snapshot)

    def abandon(self) -> None:
        """Remove the picture of this run; after the last one, restore the streams and end the thread."""
        if self._screen is not None:
            self._screen.drop(self)

    def _gave_way(self) -> bool:
        """Fall back to log lines if the picture has ended before the run; return whether it has."""
        screen = self._screen
        if screen is None or not screen.foot.reason or self._instead is not None:
            return False
        self._fall_back(screen.foot.reason, say=screen.say_once())
        return True

    def _fall_back(self, reason: str, *, say: bool = True) -> None:
        self._instead = LogReport()
        if say:  # runs that shared a picture say once why it has ended
            write_line(f"gradwatch | {reason}: log lines instead of the live picture")
