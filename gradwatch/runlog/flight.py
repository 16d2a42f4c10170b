"""The flight recorder: a record of everything that is known at the moment when a run goes wrong."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.errors import words_of
from gradwatch.runlog.plain import to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.history.history import History
    from gradwatch.records import Incident

_ROWS = 64
_WORST = 5  # layers of each row
_MOST_TEXT = 8000  # characters of a traceback


def record_of(
    history: History,
    incidents: Sequence[Incident],
    environment: dict[str, Any],
    batch: list[dict[str, Any]] | None,
    error: BaseException | None = None,
) -> str:
    """Return the last 64 rows with their largest layers, the open incidents, versions, batch and traceback as JSON."""
    norms = history.grad_norm(last=_ROWS)
    scalars = (
        history.steps(last=_ROWS),
        history.loss(last=_ROWS),
        history.global_norm(last=_ROWS),
        history.clip_coefficient(last=_ROWS),
        history.skipped(last=_ROWS),
    )
    rows = []
    for place, (step, loss, norm, coefficient, skipped) in enumerate(zip(*(s.tolist() for s in scalars), strict=True)):
        worst = np.argsort(-np.nan_to_num(norms[place], nan=np.inf), kind="stable")[:_WORST].tolist()
        rows.append(
            {
                "step": step,
                "loss": loss,
                "global_norm": norm,
                "clip_coefficient": coefficient,
                "skipped": skipped,
                "largest": {history.layers[layer]: float(norms[place, layer]) for layer in worst},
            }
        )
    return to_json(
        {
            "rows": rows,
            "incidents": [one for one in incidents if one.open],
            "versions": environment.get("versions", {}),
            "facts": history.facts,
            "batch": batch,
            "traceback": None if error is None else _traceback(error),
        }
    )


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # formatting an error of a user's class may raise
        return words_of(error)
    return text[-_MOST_TEXT:]
