"""The records that a run log returns: its sessions and the series of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.records import Facts  # noqa: TC001  pydantic reads the annotations

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gradwatch.records import Floats

_LATEST = 2.5e11  # seconds since 1970: the year 9892, which `datetime` still supports


@dataclass(frozen=True)
class ToldRule:
    """A rule as it is recorded in an environment."""

    code: str
    name: str
    rule: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Environment:
    """The types of the entries of a session's environment, all of which are optional; see `gradwatch.runlog.environment`."""

    versions: dict[str, str] = field(default_factory=dict)
    platform: str = ""
    program: str = ""
    rules: list[ToldRule] = field(default_factory=list)
    clip: str | None = None


@dataclass(frozen=True)
class Session:
    """A part of a run, from its start or a resume to its end or the next resume; see the table ``sessions``."""

    environment: dict[str, Any]
    facts: Facts
    number: int
    pid: int
    host: str
    started: float
    ended: float | None
    first_step: int | None
    until_step: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.started <= _LATEST:
            raise ValueError(f"a session began {self.started:g} seconds after 1970, which is out of range")


@dataclass(frozen=True)
class Series:
    """The scalars of a run, one value for each of ``n`` rows, oldest first; see `gradwatch.records.Scalars`.

    A log from before learning rates and loss scales were kept for each row has NaN there.
    """

    id: NDArray[np.int64]
    step: NDArray[np.int64]
    loss: Floats
    global_norm: Floats
    clip_coefficient: Floats
    skipped: NDArray[np.bool_]
    learning_rate: Floats
    loss_scale: Floats
