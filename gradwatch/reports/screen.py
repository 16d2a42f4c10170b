"""The picture of all live runs of this process on one terminal, drawn by a separate thread."""

from __future__ import annotations

import io
import os
import sys
import threading
import weakref
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group

from gradwatch.errors import words_of
from gradwatch.reports.foot import Foot
from gradwatch.reports.line import Line
from gradwatch.reports.others import another_live, bars_of_tqdm, is_stand_in
from gradwatch.reports.streams import is_terminal
from gradwatch.reports.view import View
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from gradwatch.records import Snapshot

_LOOK = 0.1  # seconds between checks for a new snapshot, another terminal size or another display
_SHARE = 0.01  # of the time, which drawing may take: it holds up the training while it holds the GIL
_LONGEST = 2.0  # seconds that a picture holds up the next one at most, however long it took
_LEAST = 4  # rows of a run that is more than its headline
_ANOTHER = "another live display is running"
_WORST_FIRST = ("confirmed", "damaged", "suspected", "healthy")

_screens: weakref.WeakSet[Screen] = weakref.WeakSet()


class Screen:
    """Draws the runs that take part, one below the other, at the foot of a terminal.

    Args:
        console: console to draw on.

    Attributes:
        foot: foot of the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.foot = Foot(console.file, self._size)  # type: ignore[arg-type]
        self.foot.share()
        self._runs: dict[object, Snapshot | None] = {}
        self._changes = 0
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._said = False
        _screens.add(self)

    def join(self, run: object) -> None:
        """Let a run take part, below those that do already."""
        self._runs[run] = None

    def show(self, run: object, snapshot: Snapshot) -> None:
        """Hand over a new snapshot of a run, which the thread draws."""
        self.foot.settled.clear()
        self._runs[run] = snapshot
        self._changes += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="gradwatch live", daemon=True)
            self._thread.start()

    def leave(self, run: object, shown: RenderableType | None = None) -> None:
        """End a run and write ``shown``: in place of the picture if it is the last, otherwise above it."""
        self._runs.pop(run, None)
        self._changes += 1
        if not self._runs:
            self._over.set()
        text = ""
        try:
            text = self._rendered(shown) if shown is not None else ""
        finally:
            if self._runs:
                self.foot.say(text)
            else:
                self.foot.end(text)
                self._join()

    def drop(self, run: object) -> None:
        """End a run that failed; if it is the last, restore the streams whatever happens."""
        try:
            self.leave(run)
        finally:
            if not self._runs:
                self.foot.leave()
                self._join()

    def say_once(self) -> bool:
        """Return True the first time: to the run that says why nothing is drawn any more."""
        first, self._said = not self._said, True
        return first

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _size(self) -> tuple[int, int]:
        """Return the actual size of the terminal, ignoring ``COLUMNS``, since it may change while the training runs."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except Exception:
            return self._console.size
        return size if min(size) > 0 else self._console.size

    def _watch(self) -> None:
        """Draw a new picture when its time has come, and the last one until then; news and another size are drawn at once.

        Nothing is drawn while no step is new, so that prompts are left alone; before a prompt, the last step is drawn.
        """
        foot, drawn, seen, due = self.foot, 0, 0, 0.0
        told: Sequence[tuple[str, bool, int]] = ()
        try:
            while not (self._over.wait(_LOOK) or foot.over):
                changes = self._changes
                snapshots = [one for one in list(self._runs.values()) if one is not None]
                tells = [(one.verdict, one.clip_on, len(one.incidents)) for one in snapshots]
                # news do not wait, but lengthen the pause after them, so that drawing takes no larger share
                early = _LONGEST if tells != told or foot.awaited else 0.0
                new = changes != seen or (foot.awaited and changes != drawn)
                if another_live(foot.stream):
                    foot.give_way(_ANOTHER)
                elif foot.resized or (new and perf_counter() >= due - early):
                    drawn, told, began = changes, tells, thread_time()
                    foot.draw(self._picture(snapshots))
                    due = min(max(due, now := perf_counter()), now + _LONGEST) + pause_after(thread_time() - began)
                elif new:
                    foot.redraw()
                seen = changes
        except Exception as error:
            foot.give_way(f"the live picture failed ({words_of(error)})")

    def _picture(self, snapshots: Sequence[Snapshot]) -> list[str]:
        columns, rows = self._size()[0], self.foot.room()
        if len(snapshots) > 1 and rows < _LEAST * len(snapshots):
            return self._drawn(*_headlines(snapshots, columns, rows))
        lines: list[str] = []
        for number, snapshot in enumerate(snapshots):  # what a run does not need is left to the next ones
            share = (rows - len(lines)) // (len(snapshots) - number)
            try:
                lines += self._drawn(*View(snapshot).lines(columns, share + 1))
            except Exception as error:
                lines.append(f"gradwatch cannot draw this step: {type(error).__name__}")
        return lines

    def _drawn(self, *lines: RenderableType) -> list[str]:
        return self._rendered(Group(*lines)).removesuffix("\n").split("\n")

    def _rendered(self, shown: Any) -> str:
        """Return a renderable as text, with the colours of the console and the width of the terminal."""
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


def pause_after(seconds: float) -> float:
    """Return the seconds to the next picture after one that took ``seconds``."""
    return min(seconds / _SHARE, _LONGEST)


def screen_for(given: Console | None) -> Screen | str:
    """Return the screen of the terminal of a console, which runs share; or why there is none.

    Args:
        given: console to draw on; None: the standard error stream.
    """
    if given is None and not is_terminal(sys.stderr):
        return "the standard error stream is not a terminal"
    stream = sys.stderr if given is None else given.file
    shared = next((one for one in list(_screens) if one.foot.draws_on(stream)), None)
    if shared is not None:
        return shared
    if given is None and is_stand_in(sys.stderr):
        return _ANOTHER
    # the stream itself, so that nothing is drawn on an object that replaces sys.stderr later
    console = given or Console(file=sys.stderr)
    reason = _hindrance(console)
    if reason is not None:
        return reason
    try:
        return Screen(console)
    except Exception as error:
        return f"the terminal cannot be shared ({words_of(error)})"


def _hindrance(console: Console) -> str | None:
    """Return why no picture can be drawn, or None if it can."""
    if not console.is_terminal:
        return "the standard error stream is not a terminal"
    if console.is_dumb_terminal or console.legacy_windows:
        return "this terminal cannot move its cursor"
    if is_stand_in(sys.stdout) or is_stand_in(sys.stderr) or another_live(console.file):
        return _ANOTHER
    return "a progress bar is running" if bars_of_tqdm() else None


def _headlines(snapshots: Sequence[Snapshot], columns: int, rows: int) -> list[RenderableType]:
    """Return a line for each run; where there is no room for all, those with the worst verdicts and how many more there are."""
    if len(snapshots) > rows:
        snapshots = sorted(snapshots, key=lambda one: _WORST_FIRST.index(one.verdict))
    lines: list[RenderableType] = [View(one).headline(columns) for one in snapshots[:rows]]
    if len(snapshots) > rows > 0:
        lines[-1] = Line(f"and {counted(len(snapshots) - rows + 1, 'more run')}", "dim")
    return lines
