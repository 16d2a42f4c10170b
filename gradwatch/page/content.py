"""The content of the page as plain values, reduced to the number of points that a screen can show."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.records import SCALED_UP
from gradwatch.reports.names import labels_of, names_of
from gradwatch.reports.standing import sentences
from gradwatch.runlog import Series
from gradwatch.runlog.latest import snapshot_of
from gradwatch.runlog.state import state_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gradwatch.records import Incident
    from gradwatch.reports.names import Names
    from gradwatch.runlog import RunLog

    Numbers = NDArray[np.floating[Any]]

_COLUMNS = 600  # of the heat map; a screen cannot show many more
_WEIGHT_COLUMNS = 300
_POINTS = 1200  # groups of rows of a line; each is drawn as its smallest and its largest value
_LABEL = 30  # characters of a layer's name beside the heat map
_MISSING = -32768
_NOTHING = -46.0  # the logarithm shown for a norm of zero
_DECADES = 700.0  # a cell is 700 times the decimal logarithm; 16 bits cover all of float32, from 1e-45


def content_of(log: RunLog) -> dict[str, Any]:
    """Return everything that the page shows."""
    snapshot, series, sessions = snapshot_of(log), _ascending(log.series()), log.sessions
    names = names_of(tuple(log.layers))
    steps, norms = log.norms()
    weight_steps, weights = log.norms(weight=True)
    return {
        "run": str(log.folder),
        "verdict": snapshot.verdict,
        "standing": [names.told(line) for line in sentences(snapshot)],
        "state": state_of(log),
        "step": int(series.step[-1]) if len(series.step) else -1,
        "facts": snapshot.facts,
        "called": snapshot.facts.called,
        "layers": [names.short(layer) for layer in log.layers],
        "labels": labels_of(tuple(log.layers), _LABEL),
        "common": names.common,
        "loss": line_of(series.step, series.loss) if snapshot.provenance.loss != "none" else None,
        "global_norm": line_of(series.step, series.global_norm),
        "clip_coefficient": line_of(series.step, series.clip_coefficient)
        if ((series.clip_coefficient < 1) | (series.clip_coefficient > SCALED_UP)).any()
        else None,
        "learning_rate": _changing(series.step, series.learning_rate),
        "loss_scale": _changing(series.step, series.loss_scale),
        "last_loss_scale": float(series.loss_scale[-1]) if len(series.step) else float("nan"),
        "skipped": series.step[series.skipped][:2000].tolist(),
        "clipped_steps": int((series.clip_coefficient < 1).sum()),
        "scaled_up_steps": int((series.clip_coefficient > SCALED_UP).sum()),
        "skipped_steps": int(series.skipped.sum()),
        "gradient": cells_of(steps, norms, _COLUMNS, log.nonfinite()),
        "weight": cells_of(weight_steps, weights, _WEIGHT_COLUMNS, log.nonfinite(weight=True)),
        "incidents": [_told(incident, names) for incident in snapshot.incidents],
        "headlines": [names.told(str(incident)) for incident in snapshot.incidents],
        "clips": [None if one.clip is None else names.told(str(one.clip)) for one in snapshot.incidents],
        "notes": [names.told(note) for note in snapshot.notes],
        "provenance": str(snapshot.provenance),
        "cost_us": snapshot.cost_us,
        "sessions": sessions,
        "rows": len(series.step),
    }


def _told(incident: Incident, names: Names) -> Incident:
    """Return an incident with all that is known of it as evidence, in the short names of layers."""
    return replace(
        incident,
        evidence=tuple(map(names.told, incident.told)),
        advice=tuple(map(names.told, incident.advice)),
        layers=tuple(map(names.short, incident.layers)),
        suspect=None if incident.suspect is None else names.short(incident.suspect),
        left=tuple(map(names.told, incident.left)),
    )


def _ascending(series: Series) -> Series:
    """Return the rows sorted by step, since a damaged or edited log may hold them in another order."""
    order = np.argsort(series.step, kind="stable")
    return Series(**{name: getattr(series, name)[order] for name in Series.__dataclass_fields__})


def _changing(steps: NDArray[np.int64], values: Numbers) -> dict[str, list[float]] | None:
    """Return the line of values; None if they are the same at all steps at which they are known, or known nowhere."""
    known = values[~np.isnan(values)]
    return line_of(steps, values) if len(known) and (known != known[0]).any() else None


def line_of(steps: NDArray[np.int64], values: Numbers) -> dict[str, list[float]]:
    """Return at most 2,400 points ``x`` and ``y``, and the steps ``bad`` at which the values stop being finite.

    If there are more rows, each group of them is reduced to its smallest and its largest value, so that a spike of one step
    keeps its height.
    """
    finite = np.isfinite(values)
    begins = finite & ~np.append(finite[1:], True)
    bad = steps[begins][:500].tolist() or ([int(steps[0])] if len(steps) and not finite[0] else [])
    if len(steps) <= 2 * _POINTS:
        return {"x": steps.tolist(), "y": _rounded(np.where(finite, values, np.nan)), "bad": bad}
    x: list[float] = []
    y: list[float] = []
    for part in np.array_split(np.arange(len(steps)), _POINTS):
        there = part[finite[part]]
        if not len(there):
            x.append(float(steps[part[0]]))
            y.append(float("nan"))
            continue
        ends = sorted({int(there[values[there].argmin()]), int(there[values[there].argmax()])})
        x += steps[ends].tolist()
        y += values[ends].tolist()
    return {"x": x, "y": _rounded(np.array(y)), "bad": bad}


def _rounded(values: Numbers) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def cells_of(
    steps: NDArray[np.int64],
    norms: Numbers,
    most: int,
    nonfinite: Iterable[tuple[int, NDArray[np.uint8]]] = (),
) -> dict[str, Any] | None:
    """Return the heat map of ``norms`` (n, L): ``x`` (c,), cells (L, c), and a packed mask of the cells that are not finite.

    The steps may have any order. A cell is 700 times the decimal logarithm of the largest norm of its steps, so that a single
    high step remains visible; -32768 stands for no value.
    """
    if not len(steps):
        return None
    there = np.unique(steps)
    gap = max(1.0, float(np.quantile(np.diff(there), 0.95))) if len(there) > 1 else 1.0
    first, last = float(there[0]), float(there[-1])
    columns = int(min(most, (last - first) // gap + 1))
    width = (last - first + gap) / columns

    def column_of(step: Any) -> Any:
        return np.clip(((step - first) / width).astype(np.int64), 0, columns - 1)

    largest = np.full((columns, norms.shape[1]), -np.inf)
    known = np.where(np.isnan(norms), -np.inf, np.minimum(norms, np.finfo(np.float32).max))
    np.maximum.at(largest, column_of(steps), known)
    broken = np.zeros((columns, norms.shape[1]), dtype=bool)
    for step, mask in nonfinite:
        broken[column_of(np.float64(step))] |= mask > 0
    with ignore_fp_warnings():
        logs = np.where(largest > 0, np.log10(largest), np.where(largest == 0, _NOTHING, np.nan))
    cells = np.where(np.isnan(logs), _MISSING, np.round(logs * _DECADES)).astype("<i2")
    return {
        "x": [round(first + width * (column + 0.5) - 0.5, 3) for column in range(columns)],
        "width": width,
        "cells": base64.b64encode(cells.T.tobytes()).decode(),
        "broken": base64.b64encode(np.packbits(broken.T, axis=1).tobytes()).decode() if broken.any() else None,
    }
