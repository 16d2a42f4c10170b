"""Arrays whose last axis has one column per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)


class Columns(Protocol):
    """What is known of every column; the arguments of `gradwatch.history.History`."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the layers."""

    @property
    def sizes(self) -> Sequence[int]:
        """Elements per layer."""

    @property
    def matrices(self) -> Sequence[bool]:
        """True for layers with two or more dimensions."""

    @property
    def fan_in(self) -> Sequence[int]:
        """Inputs of each unit of a layer."""


def widened(array: NDArray[Value], count: int, fill: float) -> NDArray[Value]:
    """Return ``array`` (..., L) with ``count`` columns; those of layers that came later hold ``fill``."""
    more = np.full((*array.shape[:-1], count - array.shape[-1]), fill, dtype=array.dtype)
    return np.concatenate([array, more], axis=-1)
