"""Reads the latest snapshot of a run from its log, as a live view in the training process would show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradwatch.errors import RunLogError
from gradwatch.records import Snapshot
from gradwatch.runlog.moment import Moment
from gradwatch.runlog.plain import from_json
from gradwatch.runlog.schema import OF_SESSION, unpacked

if TYPE_CHECKING:
    from gradwatch.runlog.reader import RunLog

_SERIES = 400  # rows for the curves, as in a live view


def snapshot_of(log: RunLog, series: int = _SERIES) -> Snapshot:
    """Return the latest snapshot that the training wrote; its curves have the last ``series`` rows.

    Raises:
        RunLogError: there is no step yet, or the log is damaged.
    """
    found, loss, global_norm = log.latest(series)
    if found is None:
        raise RunLogError(f"The run log {log.folder} holds no step yet. Wait for the first step of its training.")
    step, text, gradient, weight, nonfinite, closeness, closest = found
    count = len(log.layers)
    with log.reading():
        moment = from_json(Moment, text)
        if not -1 <= int(step) < OF_SESSION:
            raise ValueError(f"the latest snapshot has the step {step}, which is out of range")
        if step >= 0 and not len(loss):
            raise ValueError(f"the rows of its {int(step) + 1} steps are missing")
        if not moment.rules:
            closeness = None  # without rules there are no limits to be close to
        mask = np.zeros(count, dtype=np.uint8)
        mask[: len(nonfinite)] = np.frombuffer(nonfinite, dtype=np.uint8)
        rule = np.zeros(count, dtype=np.intp)
        rule[: len(closest) // 4] = np.clip(np.frombuffer(closest, dtype="<i4"), 0, max(0, len(moment.rules) - 1))
        close = unpacked(closeness, count)
        return Snapshot(
            step=int(step),
            layers=log.layers,
            loss=loss,
            global_norm=global_norm,
            grad_norm=unpacked(gradient, count),
            nonfinite=mask,
            weight_norm=unpacked(weight, count),
            closeness=np.where(np.isnan(close), -np.inf, close),
            closest=rule,
            incidents=tuple(log.incidents),
            notes=tuple(log.notes),
            **{name: getattr(moment, name) for name in Moment.__dataclass_fields__},
        )
