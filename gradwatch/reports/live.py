"""The live view in a terminal, drawn by a separate thread."""

from __future__ import annotations

import io
import os
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console, Group

from gradwatch.errors import words_of
from gradwatch.reports.base import Report
from gradwatch.reports.foot import Foot, is_drawn_on
from gradwatch.reports.log import LogReport, write_line
from gradwatch.reports.others import another_live, bars_of_tqdm, is_stand_in
from gradwatch.reports.streams import is_terminal
from gradwatch.reports.summary import Summary
from gradwatch.reports.view import View

if TYPE_CHECKING:
    from gradwatch.records import Snapshot

_LOOK = 0.1  # seconds between checks for a new snapshot, another terminal size or another display
_ANOTHER = "another live display is running"


class LiveReport(Report):
    """Draws a `View` at the foot of the terminal, while ``print``, loggers and progress bars keep working above it.

    The training thread only stores a snapshot, which a separate thread draws. At the end the summary replaces the picture. If
    the picture cannot be drawn, or another live display starts, the report says so and writes log lines instead.

    Args:
        console: console to draw on; None: the standard error stream.
    """

    period: ClassVar[float] = 0.2

    def __init__(self, console: Console | None = None) -> None:
        self._given = console
        self._begin()

    def _begin(self) -> None:
        self._console = self._given
        self._snapshot: Snapshot | None = None
        self._foot: Foot | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._instead: LogReport | None = None

    def start(self) -> None:
        """Start to intercept what is written to the terminal, or fall back to log lines."""
        self._begin()
        reason = self._hindrance()
        if reason is None:
            try:
                assert self._console is not None
                self._foot = Foot(self._console.file, self._size)  # type: ignore[arg-type]
                self._foot.share()
            except Exception as error:
                reason = f"the terminal cannot be shared ({words_of(error)})"
        if reason is not None:
            self._fall_back(reason)

    def step(self, snapshot: Snapshot) -> None:
        """Store the snapshot for the drawing thread."""
        if self._instead is None and self._foot is not None and self._foot.reason:
            self._fall_back(self._foot.reason)
            snapshot = replace(snapshot, news=tuple(incident for incident in snapshot.incidents if incident.open))
        if self._instead is not None:
            self._instead.step(snapshot)
            return
        if self._foot is not None:
            self._foot.settled.clear()
        self._snapshot = snapshot
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="gradwatch live", daemon=True)
            self._thread.start()

    def close(self, snapshot: Snapshot) -> None:
        """Replace the picture by the summary."""
        self._over.set()
        if self._foot is not None and self._foot.reason and self._instead is None:
            self._fall_back(self._foot.reason)
        if self._instead is not None:
            self._instead.close(snapshot)
        elif self._foot is not None:
            text = ""
            try:
                text = self._rendered(Summary(snapshot)) if snapshot.step >= 0 else ""
            finally:
                self._foot.end(text)
        self._join()

    def abandon(self) -> None:
        """Remove the picture, restore the streams and end the thread."""
        self._over.set()
        try:
            if self._foot is not None:
                self._foot.end()
        finally:
            if self._foot is not None:
                self._foot.leave()
            self._join()

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _fall_back(self, reason: str) -> None:
        self._instead = LogReport()
        write_line(f"gradwatch | {reason}: log lines instead of the live picture")

    def _hindrance(self) -> str | None:
        """Return why no picture can be drawn, or None if it can."""
        if self._console is None:
            if not is_terminal(sys.stderr):
                return "the standard error stream is not a terminal"
            if is_stand_in(sys.stderr):
                return _ANOTHER
            # the stream itself, so that nothing is drawn on an object that replaces sys.stderr later
            self._console = Console(file=sys.stderr)
        if not self._console.is_terminal:
            return "the standard error stream is not a terminal"
        if self._console.is_dumb_terminal or self._console.legacy_windows:
            return "this terminal cannot move its cursor"
        file = self._console.file
        if is_stand_in(sys.stdout) or is_stand_in(sys.stderr) or another_live(file) or is_drawn_on(file):
            return _ANOTHER
        return "a progress bar is running" if bars_of_tqdm() else None

    def _size(self) -> tuple[int, int]:
        """Return the actual size of the terminal, ignoring ``COLUMNS``, since it may change while the training runs."""
        assert self._console is not None
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except Exception:
            return self._console.size
        return size if min(size) > 0 else self._console.size

    def _watch(self) -> None:
        """Draw when there is a new snapshot or the size has changed. Otherwise do not draw, so that prompts are left alone."""
        foot, drawn = self._foot, None
        assert foot is not None
        try:
            while not (self._over.wait(_LOOK) or foot.over):
                snapshot = self._snapshot
                if another_live(foot.stream):
                    foot.give_way(_ANOTHER)
                elif snapshot is not drawn or foot.resized:
                    drawn = snapshot
                    foot.draw(self._picture(snapshot))
        except Exception as error:
            foot.give_way(f"the live picture failed ({words_of(error)})")

    def _picture(self, snapshot: Snapshot | None) -> list[str]:
        if snapshot is None:
            return []
        try:
            assert self._foot is not None
            lines = View(snapshot).lines(self._size()[0], self._foot.room() + 1)
            return self._rendered(Group(*lines)).removesuffix("\n").split("\n")
        except Exception as error:
            return [f"gradwatch cannot draw this step: {type(error).__name__}"]

    def _rendered(self, shown: Any) -> str:
        """Return a renderable as text, with the colours of the console and the width of the terminal."""
        assert self._console is not None
        columns, rows = self._size()
        colours: Any = self._console.color_system
        paper = Console(
            file=io.StringIO(),
            width=columns,
            height=rows,
            color_system=colours,
            no_color=self._console.no_color,
            force_terminal=True,
            force_jupyter=False,
            legacy_windows=False,
        )
        with paper.capture() as captured:
            paper.print(shown)
        return captured.get()
