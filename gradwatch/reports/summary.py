"""The summary of a run in a few lines."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding

from gradwatch.reports.line import Line
from gradwatch.reports.names import names_of
from gradwatch.reports.standing import how_the_loss_stands, standing
from gradwatch.reports.unsaid import unsaid
from gradwatch.reports.view import SEVERITY_STYLES, STYLES, headline
from gradwatch.text.wording import counted, number

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult
    from rich.text import Text

    from gradwatch.records import Incident, Snapshot

_MOST = 8


class Summary:
    """A summary of the run as a rich renderable. ``str()`` returns it as plain text."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.names = names_of(tuple(snapshot.layers))

    def __str__(self) -> str:
        text = io.StringIO()
        # lines are never wrapped; in a notebook a console would show the text at once instead of writing it to its file
        Console(file=text, width=10_000, color_system=None, legacy_windows=False, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from gradwatch.reports.card import card_of

        return card_of(self.snapshot, live=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot, facts = self.snapshot, self.snapshot.facts
        told = [incident for incident in snapshot.incidents if incident.told_in_full]
        notices = [incident for incident in snapshot.incidents if not incident.told_in_full]
        size = f"{counted(facts.layers, 'layer')}, {counted(facts.parameters, 'parameter')}"
        yield Line.assemble(
            ("gradwatch ", "bold"),
            (snapshot.verdict, STYLES[snapshot.verdict]),
            f": {counted(snapshot.step + 1, 'step')} of {facts.called} ({size})",
            f" with {facts.optimizer}" if facts.optimizer else "",
        )
        for line in standing(snapshot):
            yield Line(f"  {self.names.told(line)}", STYLES[snapshot.verdict] if snapshot.verdict == "damaged" else "")
        if ending := how_the_loss_stands(snapshot):
            yield Line(f"  {ending}", "bold" if snapshot.verdict != "healthy" else "")
        if snapshot.step >= 0:
            unseen = snapshot.provenance.loss == "none"
            loss = "no loss in the last step" if unseen else f"last loss {number(float(snapshot.loss[-1]), 4)}"
            norm = number(float(snapshot.global_norm[-1]), 4) if snapshot.measured else "none"
            yield Line(f"  {loss}, last global gradient norm {norm}")
            yield from (
                Line(f"  {answer}") for answer in (snapshot.usual_norms, snapshot.clip_use) if answer is not None
            )
            yield Line(f"  {snapshot.provenance}", "dim")
        if snapshot.clipping is not None:
            yield Line(
                f"  auto-clip {snapshot.clip_of_all}: {counted(snapshot.clipped, 'step')} clipped, {snapshot.not_clipped}"
            )
        advised: dict[str, int] = {}
        for incident in told[:_MOST]:
            yield from self._story(incident, advised)
        if len(told) > _MOST:
            yield Line(f"  and {counted(len(told) - _MOST, 'more incident')} in monitor.incidents")
        for incident in notices[:_MOST]:
            yield _indented(headline(incident, self.names), 2)
            for line in unsaid(incident, advised)[:1] if incident.open or incident.left else ():
                yield _indented(Line(f"do: {self.names.told(line)}", SEVERITY_STYLES["notice"]), 4)
        for note in snapshot.notes:
            yield _indented(Line(f"note: {self.names.told(note)}", "dim"), 2)
        if self.names.common:
            yield Line(f"  {self.names}", "dim")
        if snapshot.step >= 0:
            yield Line(f"  gradwatch itself took {snapshot.cost_us:,.0f} µs a step", "dim")

    def _story(self, incident: Incident, advised: dict[str, int]) -> RenderResult:
        yield _indented(headline(incident, self.names), 2)
        if len(incident.layers) > 1:
            more = f" and {len(incident.layers) - 4} more" if len(incident.layers) > 4 else ""
            first = ", ".join(map(self.names.short, incident.layers[:4]))
            yield _indented(Line(f"{incident.of_its_layers}: {first}{more}"), 4)
        for line in incident.told:
            yield _indented(Line(self.names.told(line)), 4)
        if incident.clip is not None:
            yield _indented(Line(f"auto-clip: {self.names.told(str(incident.clip))}"), 4)
        for line in unsaid(incident, advised):
            yield _indented(Line(f"do: {self.names.told(line)}", SEVERITY_STYLES["notice"]), 4)


def _indented(text: Text, by: int) -> Padding:
    return Padding(text, (0, 0, 0, by), expand=False)
