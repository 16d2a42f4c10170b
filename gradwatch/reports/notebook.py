"""The live report in a notebook: a card below the cell that trains, which is drawn again in its place."""

from __future__ import annotations

import os
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from gradwatch.cells import ipython, is_notebook, running_cell
from gradwatch.reports.base import Report
from gradwatch.reports.card import card_of
from gradwatch.reports.log import LogReport, write_line
from gradwatch.reports.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.cells import Cell
    from gradwatch.records import Snapshot

_ENDED = "post_run_cell"


class NotebookReport(Report):
    """Shows the run as a card in the output of the cell that makes its steps.

    The card is drawn by the training itself, at most twice a second, and once more when the cell ends; there is no thread, so
    nothing appears while other cells run. A later cell that goes on with the training has a card of its own, and the earlier one
    keeps the state at the end of its cell. At the end of the run the card becomes the summary, where it is. Outside notebooks
    the report says so and writes log lines.
    """

    period: ClassVar[float] = 0.5
    shows_notes: ClassVar[bool] = True

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._now: Callable[[], Snapshot] | None = None
        self._instead: LogReport | None = None
        self._cell: Cell | None = None  # in whose output the card stands
        self._card = ""  # its identity
        self._drawn_at = 0.0
        self._drawn: tuple[int, int] | None = None  # steps and notes that it shows
        self._thread = 0
        self._process = os.getpid()  # a copy in a forked child draws nothing

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Keep the function that returns the state of the run, for the end of a cell."""
        self._now = now

    def start(self) -> None:
        """Wait for cells to end, or fall back to log lines."""
        now = self._now
        self._begin()
        self._now = now
        if not is_notebook():
            self._instead = LogReport()
            write_line("gradwatch | this is no notebook: log lines instead of the card")
            return
        ipython().events.register(_ENDED, self._cell_ended)

    def step(self, snapshot: Snapshot) -> None:
        """Draw the card, unless it was drawn a moment ago."""
        if self._instead is not None:
            self._instead.step(snapshot)
            return
        self._thread = threading.get_ident()
        if os.getpid() == self._process and (not self._card or perf_counter() - self._drawn_at >= self.period):
            self._draw(snapshot, live=True)

    def close(self, snapshot: Snapshot) -> None:
        """Replace the card by the summary."""
        self._leave()
        if self._instead is not None:
            self._instead.close(snapshot)
        elif snapshot.step >= 0 and os.getpid() == self._process:
            self._draw(snapshot, live=False)
        self._now = None

    def abandon(self) -> None:
        """Leave the card as it is."""
        self._leave()
        self._now = None

    def _leave(self) -> None:
        shell = ipython()
        if shell is not None and self._cell_ended in shell.events.callbacks[_ENDED]:
            shell.events.unregister(_ENDED, self._cell_ended)

    def _cell_ended(self, _: Any = None) -> None:
        """Draw the last steps of the cell; those of another thread, which may go on, are drawn by that thread."""
        if self._now is None or self._thread != threading.get_ident():
            return
        snapshot = self._now()
        if (snapshot.step, len(snapshot.notes)) != self._drawn:
            self._draw(snapshot, live=True)

    def _draw(self, snapshot: Snapshot, *, live: bool) -> None:
        from IPython.display import display

        cell = running_cell()
        went_on = self._drawn is None or snapshot.step != self._drawn[0]
        # a thread beside the cells does not know to which its output belongs, so it stays where it began
        in_turn = self._thread == threading.get_ident() == threading.main_thread().ident
        fresh = not self._card or (went_on and in_turn and cell is not None and cell != self._cell)
        if fresh:
            self._card, self._cell = uuid4().hex, cell
        bundle = {"text/html": card_of(snapshot, live=live), "text/plain": str(Summary(snapshot))}
        display(bundle, raw=True, display_id=self._card, update=not fresh)
        self._drawn_at, self._drawn = perf_counter(), (snapshot.step, len(snapshot.notes))
