"""`OwnTime`: the time that watching takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class OwnTime:
    """The time inside gradwatch so far, in seconds. All parts that the training calls add to it."""

    seconds: float = 0.0
