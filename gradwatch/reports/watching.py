"""The interactive live view: order of the layers, selection, incidents and pause, controlled by keys."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich.console import Group

from gradwatch.reports.line import Line
from gradwatch.reports.names import names_of
from gradwatch.reports.view import View, headline
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from gradwatch.records import Floats, Snapshot

Order = Literal["limit", "norm", "growth"]
_HEADINGS: dict[Order, str] = {
    "limit": "closest to their limits",
    "norm": "largest gradient norm",
    "growth": "largest growth in 64 rows",
}
_KEYS = "↑↓ move · l limit · n norm · g growth · i incidents · space pause · q quit"
_PAGE = 10


class Watching:
    """The state of the interactive view of a run.

    Attributes:
        over: True once the user has quit.
        paused: True while the view is paused.
    """

    def __init__(self) -> None:
        self.over = False
        self.paused = False
        self._order: Order = "limit"
        self._place = 0
        self._incidents = False
        self._snapshot: Snapshot | None = None
        self._growth: Floats = np.zeros(0)
        self._state = ""

    def show(self, snapshot: Snapshot, growth: Floats, state: str) -> None:
        """Show a new snapshot, unless the view is paused.

        Args:
            snapshot: snapshot to show.
            growth: gradient norm over its earlier value, shape (L,).
            state: text that says whether the run goes on; it is shown even while the view is paused.
        """
        self._state = state
        if not self.paused or self._snapshot is None:
            self._snapshot, self._growth = snapshot, growth

    def wait_for(self, reason: str) -> None:
        """Show ``reason``, which says why there is no new snapshot."""
        if self._snapshot is None:
            self._state = reason
        else:
            self._state = f"nothing new: {reason}"

    def key(self, key: str) -> None:
        """Handle a key. Keys without a meaning are ignored."""
        moves = {"down": 1, "j": 1, "up": -1, "k": -1, "page down": _PAGE, "page up": -_PAGE}
        orders: dict[str, Order] = {"l": "limit", "n": "norm", "g": "growth"}
        if key in ("q", "escape"):
            self.over = True
        elif key in (" ", "p"):
            self.paused = not self.paused
        elif key == "i":
            self._incidents, self._place = not self._incidents, 0
        elif key in orders:
            self._order, self._incidents, self._place = orders[key], False, 0
        elif key in moves:
            self._place = max(0, min(self._place + moves[key], self._count - 1))
        elif key in ("home", "end"):
            self._place = 0 if key == "home" else max(0, self._count - 1)

    @property
    def _count(self) -> int:
        snapshot = self._snapshot
        if snapshot is None:
            return 0
        return len(snapshot.incidents) if self._incidents else len(snapshot.layers)

    def picture(self, width: int, height: int) -> RenderableType:
        """Return a renderable that fits a terminal of this size."""
        paused = Line(" paused ", "black on yellow") if self.paused else Line("")
        foot = [Line.assemble(paused, (self._state, "dim"), no_wrap=True, overflow="ellipsis")]
        if height >= 12:
            foot.append(Line(_KEYS, "dim", no_wrap=True, overflow="ellipsis"))
        if self._snapshot is None:
            return Group(Line("gradwatch", "bold"), *foot)
        if self._incidents:
            lines = self._stories(self._snapshot, width, height - len(foot) - 1)
            return Group(*lines, *foot)
        view = View(
            self._snapshot,
            foot,
            order=self._columns(self._snapshot),
            heading=_HEADINGS[self._order],
            selected=min(self._place, max(0, len(self._snapshot.layers) - 1)),
            most=height,
        )
        return Group(*view.lines(width, height))

    def _columns(self, snapshot: Snapshot) -> NDArray[np.intp]:
        values = {"limit": snapshot.closeness, "norm": snapshot.grad_norm, "growth": self._growth}[self._order]
        broken = snapshot.nonfinite > 0  # non-finite gradients first, missing ones last
        return np.argsort(-np.where(broken, np.inf, np.nan_to_num(values, nan=-np.inf)), kind="stable")

    def _stories(self, snapshot: Snapshot, width: int, room: int) -> list[RenderableType]:
        """Return the list of incidents, followed by the details of the selected one."""
        incidents = snapshot.incidents
        if not incidents:
            return [Line("no incident so far", "green")]
        names = names_of(tuple(snapshot.layers))
        most = max(1, min(len(incidents), room // 3))
        place = min(self._place, len(incidents) - 1)
        first = max(0, min(place - most // 2, len(incidents) - most))
        lines: list[RenderableType] = [Line(f"incident {place + 1} of {len(incidents)}", "bold")]
        for number, incident in enumerate(incidents[first : first + most], first):
            line = headline(incident, names, width)
            if number == place:
                line.stylize("reverse")
            lines.append(line)
        lines.append(Line(""))
        one = incidents[place]
        # advice before evidence, because a small terminal cuts off the end
        story = [(f"do: {line}", "cyan") for line in one.advice]
        story += [(f"auto-clip: {one.clip}", "")] if one.clip is not None else []
        order = ", ".join(map(names.short, one.layers))
        story += [(f"{one.of_its_layers}: {order}", "")] if len(one.layers) > 1 else []
        story += [(line, "") for line in one.told]
        for told, style in story:
            wrapped = textwrap.wrap(printable(names.told(told)), max(10, width - 4)) or [""]
            lines += [Line(f"  {wrapped[0]}", style), *(Line(f"    {more}", style) for more in wrapped[1:])]
        return lines[:room]
