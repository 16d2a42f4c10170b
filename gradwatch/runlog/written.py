"""A store's record of what it has written, which is restored if writing fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.runlog.thinning import Thinning

if TYPE_CHECKING:
    from gradwatch.records import Floats, Incident, Provenance


UNKNOWN: Floats = np.full(2, np.nan)  # the learning rate and the loss scale before the first row of a session
UNKNOWN.flags.writeable = False


@dataclass
class Written:
    """The record of the rows written so far. ``homes`` holds the session in which each incident opened."""

    session: int = 0
    thinning: Thinning = field(default_factory=Thinning)
    provenances: dict[Provenance, int] = field(default_factory=dict)
    provenance: int = -1
    rate: Floats | None = None
    buffers_well: bool = True
    arrived: bytes = b""  # for each layer, whether a gradient was seen to arrive so far
    family: str = ""  # of the optimizer that made the last step
    settings: Floats = field(default_factory=lambda: UNKNOWN)  # learning rate and loss scale of the last row
    incidents: dict[int, Incident] = field(default_factory=dict)
    homes: dict[int, int] = field(default_factory=dict)
    started: bool = False
    horizon: int = 0
    since_thinned: int = 0

    def copy(self) -> Written:
        """Return an independent copy."""
        return replace(
            self,
            thinning=self.thinning.copy(),
            provenances=dict(self.provenances),
            incidents=dict(self.incidents),
            homes=dict(self.homes),
        )
