"""The words that records hold: kinds, severities, verdicts, moments and sources."""

from __future__ import annotations

from typing import Literal

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

Sign = Literal["subtle", "confirming", "growth", "numeric", "silent", "clip"]
Role = Literal["", "surge", "jump", "level", "update", "overshoot", "damage", "backward", "buffer"]
Kind = Literal["exploding", "spike", "nonfinite", "diverging", "vanishing", "stalled", "dead", "frozen", "clipping"]
Severity = Literal["notice", "warning", "critical"]
Verdict = Literal["suspected", "confirmed", "damaged", "resolved"]
RunVerdict = Literal["healthy", "suspected", "confirmed", "damaged"]
Phase = Literal["loss", "gradient", "weight"]
Source = Literal[
    "optimizer step",
    "closure",
    "end of backward",
    "monitor.step()",
    "optimizer in backward",
    "left out by the scaler",
    "written",
]
Family = Literal["sgd", "adam", "other"]
CulpritSign = Literal["loss", "backward", "gradient"]
LossSource = Literal["monitor.loss()", "closure", "backward root", "written", "none"]
Behind = Literal["nothing", "a factor", "a minus sign", "more"]
Clipped = Literal["no clip before it seen", "before the user's clip", "as the optimizer sees it"]

SEVERITIES: tuple[Severity, ...] = ("notice", "warning", "critical")
VERDICTS: dict[RunVerdict, str] = {
    "healthy": "nothing that is known speaks against the run now; no incident that is more than a notice is open, and none has "
    "left something worse than before",
    "suspected": "an incident is open that is more than a notice",
    "confirmed": "such an incident is open, and a confirming sign occurred together with another one",
    "damaged": "no such incident is open, but one has left something worse than before: the loss, a dead layer, a value that is "
    "not finite; or it came with the first steps, and the loss has not been learned since; or a notice, which may be open, has "
    "undone half of what the loss had fallen",
}
EXPLOSION: tuple[Kind, ...] = ("exploding", "spike", "nonfinite", "diverging")  # stages of one incident
