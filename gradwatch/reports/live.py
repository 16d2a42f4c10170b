"""The live picture in a terminal, drawn by another thread."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gradwatch.reports.base import Report
from gradwatch.reports.log import LogReport
from gradwatch.reports.summary import Summary
from gradwatch.reports.view import View

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from gradwatch.records import Snapshot

_UP = "\x1b[A"


class LiveReport(Report):
    """Draws `View` four times a second at the foot of the terminal; ``print`` and progress bars go on working.

    The training thread only leaves a snapshot; a thread of rich draws it. At the end the picture makes way for the
    summary.

    Args:
        console: where to draw; None is the standard error stream.
    """

    period: ClassVar[float] = 0.2

    def __init__(self, console: Console | None = None) -> None:
        # the stream itself, not the name: whoever stands in for sys.stderr later must not be drawn into
        self._console = console or Console(file=sys.stderr)
        self._snapshot: Snapshot | None = None
        self._live: Live | None = None
        self._above: dict[str, _Above] = {}
        self._instead: LogReport | None = None

    def start(self) -> None:
        """Stand between the standard streams and the terminal, so that what is written later goes above the picture."""
        # another picture is drawn here already: this report writes lines above it
        if any(hasattr(stream, "rich_proxied_file") for stream in (sys.stdout, sys.stderr)):
            self._instead = LogReport()
            return
        for name in ("stdout", "stderr") if self._console.is_terminal else ():
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._above[name] = _Above(self._console, stream)
                setattr(sys, name, self._above[name])

    def step(self, snapshot: Snapshot) -> None:
        """Leave the snapshot for the drawing thread."""
        if self._instead is not None:
            self._instead.step(snapshot)
            return
        self._snapshot = snapshot
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def close(self, snapshot: Snapshot) -> None:
        """Clear the picture and print the summary in its place."""
        if self._instead is not None:
            self._instead.close(snapshot)
            return
        for name, above in self._above.items():
            if getattr(sys, name) is above:
                setattr(sys, name, above.rich_proxied_file)
            above.finish()
        self._above.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if snapshot.step >= 0:
            self._console.print(Summary(snapshot))

    def _picture(self) -> RenderableType:
        if self._snapshot is None:
            return Text()
        view = View(self._snapshot, [row for above in self._above.values() for row in above.below()])
        try:
            return Group(*view.lines(self._console.width, self._console.height))
        except Exception as error:
            return Text(f"gradwatch cannot draw this step: {type(error).__name__}: {error}")


class StatusLines:
    r"""What progress bars draw over and over: their rows, kept as a terminal would keep them.

    Bars return to the start of their row (``\\r``), go down with a newline and up with an escape code.
    """

    _MOST = 3
    _PIECES = re.compile(r"\x1b\[A|\r|\n|\x1b\[[\d;]*[A-Za-z]|[^\r\n\x1b]+")

    def __init__(self) -> None:
        self._rows: list[str] = []
        self._row = 0
        self._fresh = False

    def texts(self) -> list[Text]:
        """The rows, to be shown below the picture."""
        return [Text.from_ansi(row, no_wrap=True, overflow="ellipsis") for row in self._rows if row.strip()]

    def takes(self, text: str) -> bool:
        """True when this is written by a bar rather than by a print."""
        return "\r" in text or _UP in text or (text == "\n" and bool(self._rows))

    def feed(self, text: str) -> list[str]:
        """Take what a bar wrote; return the rows that are finished because newer ones need the room."""
        for piece in self._PIECES.findall(text):
            if piece == _UP:
                self._row = max(0, self._row - 1)
            elif piece == "\n":
                self._row += 1
            elif piece == "\r":
                self._fresh = True
            else:
                self._rows += [""] * (self._row + 1 - len(self._rows))
                self._rows[self._row] = piece if self._fresh else self._rows[self._row] + piece
                self._fresh = False
        finished = self._rows[: max(0, len(self._rows) - self._MOST)]
        self._rows = self._rows[len(finished) :]
        self._row -= len(finished)
        return [row for row in finished if row.strip()]

    def finish(self) -> list[str]:
        """Return the rows that are left."""
        rows, self._rows, self._row = [row for row in self._rows if row.strip()], [], 0
        return rows


class _Above:
    """Stands in for a standard stream while the picture is drawn: whole lines are printed above it."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console = console
        self._partial = ""
        self.rich_proxied_file = stream  # by this name rich finds the stream below
        self.status = StatusLines()
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        """Print whole lines above the picture; keep a bar's rows for below it."""
        if self._ended:
            return self.rich_proxied_file.write(text)
        text_ = text.replace("\r\n", "\n")
        if not self._partial and self.status.takes(text_):
            self._print(self.status.feed(text_))
        else:
            *lines, self._partial = (self._partial + text_).split("\n")
            self._print(lines)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """See `io.TextIOBase`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Do nothing: a line without its end is shown below the picture, such as the prompt of an input."""

    def below(self) -> list[Text]:
        """What belongs below the picture: bars, and a line that is not finished."""
        partial = [Text.from_ansi(self._partial, no_wrap=True, overflow="ellipsis")] if self._partial.strip() else []
        return self.status.texts() + partial

    def finish(self) -> None:
        """Print what is left."""
        rest = [self._partial] if self._partial else []
        self._partial = ""
        self._print(self.status.finish() + rest)
        self._ended = True  # whoever still holds this writes straight on

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text.from_ansi(line), soft_wrap=True)
