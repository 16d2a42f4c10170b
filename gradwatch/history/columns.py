"""Arrays whose last axis has one column per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)


class Columns(Protocol):
    """Properties of each column, one per layer; also the arguments of `gradwatch.history.History`."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the layers."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of elements of each layer."""

    @property
    def matrices(self) -> Sequence[bool]:
        """Whether each layer has two or more dimensions."""

    @property
    def fan_in(self) -> Sequence[int]:
        """The number of inputs of each unit, per layer."""


def weights_of(names: Sequence[str]) -> NDArray[np.intp]:
    """Return the column of the weight that each bias belongs to, by their names, shape (L,); -1 where there is none."""
    column = {name: index for index, name in enumerate(names)}
    found = [column.get(_weight_beside(name), -1) for name in names]
    return np.array(found, dtype=np.intp)


def _weight_beside(bias: str) -> str:
    """Return the name of the weight beside a bias, as ``rnn.weight_hh_l0`` beside ``rnn.bias_hh_l0``; "" for other names."""
    module, dot, parameter = bias.rpartition(".")
    return module + dot + parameter.replace("bias", "weight") if "bias" in parameter else ""


def widened(array: NDArray[Value], count: int, fill: float) -> NDArray[Value]:
    """Return ``array`` (..., L) extended to ``count`` columns; the columns of new layers hold ``fill``."""
    more = np.full((*array.shape[:-1], count - array.shape[-1]), fill, dtype=array.dtype)
    return np.concatenate([array, more], axis=-1)
