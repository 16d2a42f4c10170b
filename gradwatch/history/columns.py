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


def weights_of(names: Sequence[str], matrices: Sequence[bool]) -> NDArray[np.intp]:
    """Return the column of the weight that each bias or gain belongs to, shape (L,); -1 where there is none.

    It is the parameter whose name differs by "weight" for "bias", such as ``rnn.weight_hh_l0`` for ``rnn.bias_hh_l0``, or else
    a matrix of the same module, parametrisations of it included.
    """
    column = {name: index for index, name in enumerate(names)}
    matrix = {_module_of(name): index for index, name in enumerate(names) if matrices[index]}
    return np.array([_weight_of(name, column, matrix, matrices) for name in names], dtype=np.intp)


def _weight_of(name: str, column: dict[str, int], matrix: dict[str, int], matrices: Sequence[bool]) -> int:
    module, dot, parameter = name.rpartition(".")
    weight = column.get(module + dot + parameter.replace("bias", "weight"), -1) if "bias" in parameter else -1
    if weight < 0 and dot and not matrices[column[name]]:
        return matrix.get(_module_of(name), -1)
    return weight


def _module_of(name: str) -> str:
    """Return the name of the module of a parameter, of a parametrised one that of the module whose weight it makes."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def widened(array: NDArray[Value], count: int, fill: float) -> NDArray[Value]:
    """Return ``array`` (..., L) extended to ``count`` columns; the columns of new layers hold ``fill``."""
    more = np.full((*array.shape[:-1], count - array.shape[-1]), fill, dtype=array.dtype)
    return np.concatenate([array, more], axis=-1)
