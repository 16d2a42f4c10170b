"""What a run log says of its sessions and of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gradwatch.records import Facts, Floats


@dataclass(frozen=True)
class Session:
    """One process's part of a run; see the table ``sessions``."""

    environment: dict[str, Any]
    facts: Facts
    number: int
    pid: int
    host: str
    started: float
    ended: float | None
    first_step: int | None
    until_step: int | None


@dataclass(frozen=True)
class Series:
    """The run as it stands: one number for each of ``n`` rows, oldest first. See `gradwatch.records.Row`."""

    id: NDArray[np.int64]
    step: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    clip_coefficient: Floats
    skipped: NDArray[np.bool_]
