"""Rows and snapshots as named numbers and incidents as text, for experiment loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.reports.log import incident_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.records import Incident, Scalars, Snapshot


def root_of(name: str) -> str:
    """Return what the names of all that is logged of a model begin with; ``name`` is that of the model, and may be empty."""
    return f"gradwatch/{name}/" if name else "gradwatch/"


class NamedRows:
    """Gives the numbers of each row of a run names, and the time at which it was made, as far as that is known.

    Args:
        now: time at which the run begins, in seconds since 1970.
        root: beginning of all names.
    """

    def __init__(self, now: float, root: str) -> None:
        self._time = now
        self._root = root
        self._seen = False

    def of(self, rows: Scalars, now: float) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Yield step, time, and numbers by name of each row; those between the last call and ``now`` are evenly spaced.

        The numbers are the loss, the global norm before and after clipping, the clip coefficient, the learning rate and the loss
        scale. What is not known of a step is left out; a loss is known to be NaN only if there was a number before.
        """
        times = np.linspace(self._time, now, len(rows.step) + 1)[1:].tolist()
        self._time = now
        columns = {
            "loss": rows.loss,
            "global_norm": rows.global_norm,
            "global_norm_after_clip": rows.global_norm * rows.clip_coefficient,
            "clip_coefficient": rows.clip_coefficient,
            "learning_rate": rows.learning_rate,
            "loss_scale": rows.loss_scale,
        }
        of_each = zip(*(values.tolist() for values in columns.values()), strict=True)
        for step, time, (loss, *others) in zip(rows.step.tolist(), times, of_each, strict=True):
            self._seen = self._seen or not math.isnan(loss)
            told = dict(zip(columns, (loss, *others), strict=True))
            for name, known in (
                ("loss", self._seen),
                ("learning_rate", told["learning_rate"] >= 0),
                ("loss_scale", told["loss_scale"] > 0),
            ):
                if not known:
                    del told[name]
            yield step, time, {self._root + name: value for name, value in told.items()}


def scalars_of(snapshot: Snapshot, worst: int) -> dict[str, float]:
    """Return the numbers to log for a snapshot, by name.

    These are the global norm before and after clipping, the clip coefficient, and those of `standing_of`.
    """
    root = root_of(snapshot.facts.name)
    norm = float(snapshot.global_norm[-1]) if len(snapshot.global_norm) else float("nan")
    return {
        f"{root}global_norm": norm,
        f"{root}global_norm_after_clip": norm * snapshot.clip_coefficient,
        f"{root}clip_coefficient": snapshot.clip_coefficient,
        **standing_of(snapshot, worst),
    }


def standing_of(snapshot: Snapshot, worst: int) -> dict[str, float]:
    """Return the number of open incidents, and the gradient norms of the ``worst`` layers closest to their limits, by name."""
    root = root_of(snapshot.facts.name)
    told = {f"{root}open_incidents": float(sum(one.open for one in snapshot.incidents))}
    for column in np.argsort(-snapshot.closeness, kind="stable")[:worst].tolist():
        told[f"{root}gradient_norm/{snapshot.layers[column]}"] = float(snapshot.grad_norm[column])
    return told


def text_of(incidents: Sequence[Incident]) -> str:
    """Return incidents as Markdown, with the lines of `incident_lines`."""
    return "\n\n".join("    " + "\n    ".join(incident_lines(incident)) for incident in incidents)
