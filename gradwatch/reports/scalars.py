"""Snapshots as named numbers and incidents as text, for experiment loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.reports.log import incident_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.records import Incident, Snapshot


def scalars_of(snapshot: Snapshot, worst: int) -> dict[str, float]:
    """Return the numbers to log for a snapshot, by name.

    These are the global norm before and after clipping, the clip coefficient, the number of open incidents, and the gradient
    norms of the ``worst`` layers closest to their limits.
    """
    norm = float(snapshot.global_norm[-1]) if len(snapshot.global_norm) else float("nan")
    told = {
        "gradwatch/global_norm": norm,
        "gradwatch/global_norm_after_clip": norm * snapshot.clip_coefficient,
        "gradwatch/clip_coefficient": snapshot.clip_coefficient,
        "gradwatch/open_incidents": float(sum(one.open for one in snapshot.incidents)),
    }
    for column in np.argsort(-snapshot.closeness, kind="stable")[:worst].tolist():
        told[f"gradwatch/gradient_norm/{snapshot.layers[column]}"] = float(snapshot.grad_norm[column])
    return told


def text_of(incidents: Sequence[Incident]) -> str:
    """Return incidents as Markdown, with the lines of `incident_lines`."""
    return "\n\n".join("    " + "\n    ".join(incident_lines(incident)) for incident in incidents)
