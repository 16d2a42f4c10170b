"""A run as a piece of HTML, as a notebook shows it: in the style of the page, light or dark as the notebook is."""

from __future__ import annotations

import html
import math
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.reports.names import labels_of, names_of
from gradwatch.reports.standing import sentences
from gradwatch.reports.view import brief, headline, pace
from gradwatch.text.printable import printable
from gradwatch.text.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from gradwatch.records import Floats, Incident, RunVerdict, Snapshot
    from gradwatch.reports.names import Names

_LAYERS = 5
_LABEL = 60  # characters of a layer's name
_BRIEFLY, _MOST = 3, 8  # incidents
_NOTES = 5
_WIDTH, _HEIGHT = 400.0, 44.0  # of a chart, in its own units
COLOURS: dict[RunVerdict, str] = {
    "healthy": "healthy",
    "suspected": "warning",
    "confirmed": "critical",
    "damaged": "critical",
}
# how notebooks say that they are dark: JupyterLab and nbconvert, VS Code, Colab, pages of documentation
_DARK = (
    'body[data-jp-theme-light="false"]',
    "body.vscode-dark",
    "body.vscode-high-contrast:not(.vscode-high-contrast-light)",
    'html[theme="dark"]',
    'html[data-theme="dark"]',
)
_SILENT = 'body:not([data-jp-theme-light]):not([class*="vscode"])'  # one that does not say: as the system is


@cache
def palette() -> str:
    """Return the colours, light and dark, as style sheets that the page and the card share."""
    return _read("palette.css")


@cache
def _style() -> str:
    light, dark = re.findall(r"\{([^}]*)\}", palette())
    chosen = ", ".join(f"{host} .gradwatch" for host in _DARK)
    system = f"@media (prefers-color-scheme: dark) {{ {_SILENT} .gradwatch {{{dark}}} }}"
    return f".gradwatch {{{light}}}\n{system}\n{chosen} {{{dark}}}\n{_read('card.css')}"


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def card_of(snapshot: Snapshot, *, live: bool) -> str:
    """Return the card of a run as HTML that needs nothing else.

    Args:
        snapshot: state to show.
        live: whether the run goes on: the layers closest to their limits and the last incidents in brief, as in the live view.
            Otherwise all of what the summary tells.
    """
    names, facts = names_of(tuple(snapshot.layers)), snapshot.facts
    parts = [
        '<div class="gw-head">'
        f'<span class="gw-title"><span class="gw-{COLOURS[snapshot.verdict]}">● {_text(snapshot.verdict)}</span> '
        f"{_text(facts.called)}</span> "
        f'<span class="gw-soft"><b>gradwatch</b> · {_text(_progress(snapshot, live=live))}</span></div>',
        *(f"<div>{_text(names.told(line))}</div>" for line in sentences(snapshot)),
    ]
    if snapshot.step >= 0:
        parts.append(f'<div class="gw-charts">{"".join(_charts(snapshot))}</div>')
        parts += [f"<div>{_text(one)}</div>" for one in (snapshot.usual_norms, snapshot.clip_use) if one is not None]
    if live and snapshot.step >= 0:
        parts.append(_table(snapshot, names))
    if snapshot.clipping is not None:
        state = f" {'on' if snapshot.clip_on else 'armed'}" if live else ""
        done = f"{counted(snapshot.clipped, 'step')} clipped, {snapshot.not_clipped}"
        parts.append(f"<div><b>auto-clip{state}</b> {_text(snapshot.clip_of_all)}: {done}</div>")
    parts += _stories(snapshot, names, live=live)
    parts += _notes(snapshot.notes, names)
    parts += (f'<div class="gw-soft">{_text(line)}</div>' for line in _foot(snapshot, names, live=live))
    return f'<style>{_style()}</style><div class="gradwatch">{"".join(parts)}</div>'


def _text(text: object) -> str:
    return html.escape(printable(text))


def _progress(snapshot: Snapshot, *, live: bool) -> str:
    if snapshot.step < 0:
        return "no step yet"
    facts = snapshot.facts
    optimizer = f" · {facts.optimizer} {facts.rate:.3g}" if facts.optimizer else ""
    return (f"step {snapshot.step:,}" if live else f"{snapshot.step + 1:,} steps") + optimizer


def _charts(snapshot: Snapshot) -> Iterator[str]:
    for title, values in (("loss", snapshot.loss), ("global norm", snapshot.global_norm)):
        seen = bool(len(values)) and not (title == "loss" and snapshot.provenance.loss == "none")
        if not seen:
            yield f"<div>{title} <b>not seen</b></div>"
            continue
        finite = values[np.isfinite(values)]
        span = f" · {brief(float(finite.min()))} to {brief(float(finite.max()))}" if len(finite) > 1 else ""
        rows = f"last {len(values):,} rows" if len(values) > 1 else ""
        last = brief(float(values[-1])) if title == "loss" or snapshot.measured else "none"
        yield (
            f'<div><div>{title} <b>{last}</b> <span class="gw-soft">{rows}{span}</span></div>'
            f"{_chart(values, title)}</div>"
        )


def _chart(values: Floats, title: str) -> str:
    """Return the values as a line, on a log scale if all finite ones are positive; red where they are not finite."""
    finite = np.isfinite(values)
    shown = values[finite]
    if shown.size and (shown > 0).all():
        values, shown = np.log(np.where(finite, values, 1.0)), np.log(shown)
    low, high = (shown.min() / 2, shown.max() / 2) if shown.size else (0.0, 0.0)  # halved: the span cannot overflow
    span = high - low
    x = np.linspace(0.0, _WIDTH, len(values)) if len(values) > 1 else np.array([_WIDTH])
    path, drawing = [], False
    for at, value, well in zip(x.tolist(), values.tolist(), finite.tolist(), strict=True):
        if well:
            y = _HEIGHT / 2 if not span else (_HEIGHT - 4) * (1 - (value / 2 - low) / span) + 2
            path.append(f"{'L' if drawing else 'M'}{at:.1f} {y:.1f}")
        drawing = well
    broken = "".join(
        f'<rect fill="#c0243a" opacity="0.45" x="{x[first] - 1:.1f}" width="{x[last] - x[first] + 2:.1f}" height="{_HEIGHT:g}"/>'
        for first, last in _stretches(~finite)
    )
    # colours and size once more for viewers that remove style sheets
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="{_WIDTH:g}" height="{_HEIGHT:g}" preserveAspectRatio="none" '
        f'role="img" aria-label="{title}"><path fill="none" stroke="#2b62b8" d="{"".join(path)}"/>{broken}</svg>'
    )


def _stretches(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last index of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True)


def _table(snapshot: Snapshot, names: Names) -> str:
    labels = labels_of(tuple(snapshot.layers), _LABEL)
    without = f" · {names.common}…" if names.common else ""
    head = (
        f'<tr><th>closest to their limits{_text(without)}</th><th>gradient</th><th class="gw-weight">weight</th>'
        '<th class="gw-left">of limit</th><th class="gw-left gw-sign">sign</th></tr>'
    )
    rows = []
    for column in np.argsort(-snapshot.closeness, kind="stable")[:_LAYERS]:
        share, norm = float(snapshot.closeness[column]), float(snapshot.grad_norm[column])
        missing = math.isnan(norm) and not snapshot.nonfinite[column]
        sign = _text(snapshot.rules[snapshot.closest[column]]) if share >= 0 else ""
        rows.append(
            f"<tr><td>{_text(labels[column])}</td><td>{'-' if missing else brief(norm)}</td>"
            f'<td class="gw-weight">{brief(float(snapshot.weight_norm[column]))}</td>'
            f'<td class="gw-left">{_bar(share)}</td><td class="gw-left gw-sign">{sign}</td></tr>'
        )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _bar(share: float) -> str:
    if math.isnan(share) or share < 0:
        return "-"
    colour = "healthy" if share < 0.5 else "warning" if share <= 1 else "critical"
    told = f"{share:.2f}" if share < 10 else f"{share:.0f}" if share < 1e4 else f"{share:.0e}"
    width = round(100 * min(1.0, share))
    return f'<span class="gw-bar gw-{colour}"><i style="width:{width}%"></i></span>{told}'


def _stories(snapshot: Snapshot, names: Names, *, live: bool) -> Iterator[str]:
    told = [incident for incident in snapshot.incidents if incident.told_in_full]
    if live:
        told.sort(key=lambda incident: (incident.open, incident.opened_step))
        yield from (_story(incident, names, brief=True) for incident in told[-_BRIEFLY:])
        return
    yield from (_story(incident, names, brief=False) for incident in told[:_MOST])
    if len(told) > _MOST:
        yield f"<div>and {counted(len(told) - _MOST, 'more incident')} in monitor.incidents</div>"
    notices = [incident for incident in snapshot.incidents if not incident.told_in_full]
    yield from (f'<div class="gw-notice">{_text(headline(incident, names))}</div>' for incident in notices[:_MOST])


def _story(incident: Incident, names: Names, *, brief: bool) -> str:
    damaged = incident.verdict == "damaged"
    colour = incident.severity if incident.open or damaged else "resolved"
    parts = [f"<b>{_text(headline(incident, names))}</b>"]
    if len(incident.layers) > 1 and not brief:
        more = f" and {len(incident.layers) - 8} more" if len(incident.layers) > 8 else ""
        order = " → ".join(map(names.short, incident.layers[:8]))
        parts.append(f'<div class="gw-soft">{incident.of_its_layers}: {_text(order)}{more}</div>')
    said = incident.told[:1] if brief else incident.told
    if said and (incident.open or not brief):
        parts.append(_list(map(names.told, said)))
    if incident.clip is not None:
        parts.append(f"<div><b>auto-clip</b> {_text(names.told(str(incident.clip)))}</div>")
    advice = incident.advice[:1] if brief else incident.advice
    if advice and (incident.open or not brief):
        parts.append(f'<div class="gw-label">what to do</div>{_list(map(names.told, advice), "gw-do")}')
    return f'<div class="gw-story gw-{colour}">{"".join(parts)}</div>'


def _list(lines: Iterable[str], kind: str = "") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>'


def _notes(notes: tuple[str, ...], names: Names) -> Iterator[str]:
    yield from (f'<div class="gw-soft">note: {_text(names.told(note))}</div>' for note in notes[-_NOTES:])
    if len(notes) > _NOTES:
        yield f'<div class="gw-soft">and {len(notes) - _NOTES} earlier notes in monitor.notes</div>'


def _foot(snapshot: Snapshot, names: Names, *, live: bool) -> Iterator[str]:
    facts = snapshot.facts
    size = f"{counted(facts.layers, 'layer')}, {counted(facts.parameters, 'parameter')}"
    if live:
        yield f"{size} · {pace(snapshot)}" if snapshot.step >= 0 else size
        return
    yield f"{size} · {snapshot.provenance}" if snapshot.step >= 0 else size
    if names.common:
        yield str(names)
    if snapshot.step >= 0:
        yield f"gradwatch itself took {snapshot.cost_us:,.0f} µs a step"
