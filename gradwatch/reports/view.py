"""The live view of a run as a rich renderable: verdict, curves, the layers closest to their limits, incidents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.table import Table

from gradwatch.reports.line import Line
from gradwatch.reports.names import labels_of, names_of, shorten
from gradwatch.reports.sparkline import sparkline
from gradwatch.reports.standing import standing
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

    from gradwatch.records import Incident, RunVerdict, Snapshot
    from gradwatch.reports.names import Names

STYLES: dict[RunVerdict, str] = {
    "healthy": "bold green",
    "suspected": "bold yellow",
    "confirmed": "bold red",
    "damaged": "bold magenta",
}
SEVERITY_STYLES = {"notice": "cyan", "warning": "yellow", "critical": "red"}
_MOST_LINES = 24
_BAR = 8
_ROOMY = 16  # lines of a terminal that has room for more than the curves and the layers


def brief(value: float) -> str:
    """Return a number as text of at most nine characters, with ``NaN`` and ``Inf`` spelled out."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


class View:
    """A snapshot as a renderable that fits a console of any size.

    Args:
        snapshot: snapshot to show.
        status: lines to show below, such as progress bars.
        order: columns of the layers to list, in this order; None: those closest to their limits first.
        heading: heading of the list, which says how it is ordered.
        selected: index into ``order`` of the layer to mark and to keep visible; None: no layer is marked.
        most: largest number of lines.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        status: Sequence[Text] = (),
        order: NDArray[np.intp] | None = None,
        heading: str = "closest to their limits",
        selected: int | None = None,
        most: int = _MOST_LINES,
    ) -> None:
        self.snapshot = snapshot
        self.status = status
        self.order = np.argsort(-snapshot.closeness, kind="stable") if order is None else order
        self.heading = heading
        self.selected = selected
        self.most = most
        self.names = names_of(tuple(snapshot.layers))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width, console.size.height)

    def lines(self, width: int, height: int) -> Iterator[RenderableType]:
        """Yield renderables that fit a terminal of this size, with one line to spare."""
        height = min(height - 1, self.most)
        head = [self.headline(width), *self._curves(width)]
        head += self._answers(width) if height >= _ROOMY else ()
        foot = [
            *self._incidents(width, most=3 if height >= 20 else 1),
            *self._auto_clip(width),
            self._footer(width),
            *self.status,
        ]
        room = height - len(head) - len(foot) - 1
        yield from head
        if room >= 1:
            yield self._layers(width, room)
        yield from foot[: max(1, height - len(head))]

    def headline(self, width: int) -> Text:
        """Return the first line: name, verdict, step, model and optimizer, as far as they fit."""
        snapshot = self.snapshot
        facts, beside = snapshot.facts, standing(snapshot)
        line = Line.assemble((_who(facts.name, width), "bold"), (f"● {snapshot.verdict}", STYLES[snapshot.verdict]))
        for part in (
            f", {self.names.told(beside[0])}" if beside else "",
            f"  step {snapshot.step:,}",
            f"  {facts.model}",
            f"  {facts.optimizer} {facts.rate:.3g}" if facts.optimizer else "",
        ):
            if cell_len(line.plain + printable(part)) <= width:
                line.append(part)
            elif part.startswith(", "):  # never a bar beyond its limit under a word that says nothing of it
                line.append(part.partition(":")[0])
        return _cut(line, width)

    def _curves(self, width: int) -> Iterator[Text]:
        for label, values in (("loss", self.snapshot.loss), ("global norm", self.snapshot.global_norm)):
            last = float(values[-1]) if len(values) else math.nan
            seen = bool(len(values)) and not (label == "loss" and self.snapshot.provenance.loss == "none")
            known = seen and (label == "loss" or self.snapshot.measured)
            line = Line.assemble((f"{label:<12}", "bold"), f"{brief(last) if known else '-':>9} ")
            for block in sparkline(values, width - len(line.plain)) if seen else "":
                line.append(block, "bold red" if block == "×" else "cyan")
            yield line

    def _answers(self, width: int) -> Iterator[Text]:
        """Yield whether the norm is usual and what the clip does, each only if it is known and fits as a whole."""
        for answer in (self.snapshot.usual_norms, self.snapshot.clip_use):
            forms = () if answer is None else (str(answer), answer.brief)
            yield from [Line(form) for form in forms if cell_len(form) <= width][:1]

    def _layers(self, width: int, most: int) -> Table:
        snapshot = self.snapshot
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold dim")
        name_width = max(8, width - 10 - (10 if width >= 60 else 0) - (_BAR + 8) - (40 if width >= 100 else 0))
        table.add_column(self._list_heading(name_width), no_wrap=True, ratio=1)
        table.add_column("gradient", justify="right", no_wrap=True)
        if width >= 60:
            table.add_column("weight", justify="right", no_wrap=True)
        table.add_column("of limit", no_wrap=True, width=_BAR + 6)
        if width >= 100:
            table.add_column("sign", no_wrap=True)
        labels = labels_of(tuple(snapshot.layers), name_width)
        first = 0 if self.selected is None else max(0, min(self.selected - most // 2, len(self.order) - most))
        for place, column in enumerate(self.order[first : first + most], first):
            share = float(snapshot.closeness[column])
            norm = float(snapshot.grad_norm[column])
            missing = math.isnan(norm) and not snapshot.nonfinite[column]
            cells: list[Text] = [
                Line(labels[column]),
                Line("-" if missing else brief(norm)),
            ]
            if width >= 60:
                cells.append(Line(brief(float(snapshot.weight_norm[column]))))
            cells.append(_bar(share))
            if width >= 100:
                known = share >= 0
                cells.append(Line(snapshot.rules[snapshot.closest[column]] if known else "", "dim"))
            table.add_row(*cells, style="reverse" if place == self.selected else None)
        return table

    def _list_heading(self, width: int) -> str:
        whole = f"{self.heading} · {self.names.common}…"
        return printable(whole) if self.names.common and cell_len(whole) <= width else self.heading

    def _incidents(self, width: int, most: int) -> Iterator[Text]:
        found = [incident for incident in self.snapshot.incidents if incident.told_in_full]
        found.sort(key=lambda incident: (incident.open, incident.opened_step))
        for incident in found[-most:]:
            yield headline(incident, self.names, width)
            if incident.open and incident.origin is not None:
                yield _cut(Line(f"  {self.names.told(str(incident.origin))}"), width)
            elif incident.open and incident.evidence and most > 1:
                yield _cut(Line(f"  {self.names.told(incident.evidence[0])}"), width)
            if incident.open and incident.advice:
                yield _cut(Line(f"  do: {self.names.told(incident.advice[0])}"), width)
            elif incident.clip is not None:
                yield _cut(Line(f"  auto-clip: {incident.clip}"), width)

    def _auto_clip(self, width: int) -> Iterator[Text]:
        snapshot = self.snapshot
        if snapshot.clipping is None:
            return
        state = ("on", "bold yellow") if snapshot.clip_on else ("armed", "green")
        yield _cut(
            Line.assemble(
                ("auto-clip ", "bold"),
                state,
                f"  {snapshot.clipping}, {snapshot.clipped:,} clipped, {snapshot.not_clipped}",
            ),
            width,
        )

    def _footer(self, width: int) -> Text:
        return _cut(Line(pace(self.snapshot), "dim"), width)


def pace(snapshot: Snapshot) -> str:
    """Return the speed of the training, if it is known, and what gradwatch takes of it."""
    speed, own = snapshot.steps_per_second, f"gradwatch itself {snapshot.cost_us:,.0f} µs a step"
    if math.isnan(speed):
        return own
    steps = f"{speed:,.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s"
    return f"{steps} · {own} ({snapshot.cost_us * speed / 1e4:.1f} %)"


def headline(incident: Incident, names: Names, width: int | None = None) -> Text:
    """Return an incident as one line of at most ``width`` cells: mark, kind, verdict, severity, steps, suspect.

    Without a width, whole and with its origin.
    """
    mark = {"notice": "·", "warning": "▲", "critical": "■"}[incident.severity]
    style = SEVERITY_STYLES[incident.severity]
    if not incident.open:
        mark, style = ("✓", "green") if incident.verdict == "resolved" else ("✗", STYLES["damaged"])
    if width is None:
        return Line(f"{mark} {names.told(str(incident))}", style)
    left = f": {'; '.join(incident.left)}" if incident.left else ""
    text, suspect = f"{mark} {names.told(incident.headline)}", printable(names.short(incident.suspect or ""))
    if suspect and cell_len(text) > width and text.endswith(suspect):
        before = text.removesuffix(suspect)
        text = before + shorten(suspect, max(8, width - cell_len(before)))
    return _cut(Line(text + names.told(left), style), width)


def _who(name: str, width: int) -> str:
    """Return what stands before the verdict, for which at least 12 of the ``width`` cells are left."""
    room = width - len("gradwatch ● suspected ")
    if not name:
        return "gradwatch "
    return f"gradwatch {shorten(name, room)} " if room >= min(8, len(name)) else f"{shorten(name, width - 12)} "


def _bar(share: float) -> Text:
    if math.isnan(share) or share < 0:
        return Line("-", "dim")
    filled = round(min(1.0, share) * _BAR)
    style = "green" if share < 0.5 else "yellow" if share <= 1 else "bold red"
    text = f"{share:.2f}" if share < 10 else f"{share:.0f}" if share < 1e4 else f"{share:.0e}"
    return Line.assemble(("█" * filled + "░" * (_BAR - filled), style), f" {text}")


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text
