"""The base classes of clips: frozen bounds and a method that changes gradients in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field

from gradwatch.device import Copies, moved
from gradwatch.errors import UsageError, did_you_mean
from gradwatch.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

    from gradwatch.history.history import History
    from gradwatch.records import Floats

_EXTREME = 1e-30  # factors below it, or above its inverse, leave float32's range: they are applied in two halves


@dataclass(slots=True)
class Step:
    """The gradients of one step and their norms, so that a clip need not measure them again.

    Args:
        layers: names of all L columns.
        gradients: n tensors, which a clip changes in place; of sharded tensors, the part that this process holds.
        parameters: the n parameters that the gradients belong to.
        columns: their columns, shape (n,).
        norms: L2 norms of the whole layers, without the loss scale, shape (n,).
        global_norm: L2 norm of all gradients as one vector, without the loss scale.
        scale: loss scale that the gradients still carry.
    """

    layers: Sequence[str]
    gradients: list[Tensor]
    parameters: Sequence[Tensor]
    columns: NDArray[np.intp]
    norms: Floats
    global_norm: float
    scale: float = 1.0


@dataclass(slots=True)
class UnreadStep:
    """The gradients of one step whose norms are on a device and are not read on the host.

    Args:
        layers, gradients, parameters, columns: as in `Step`. Gradients may lie on several devices.
        norms: as in `Step`, a float64 tensor of shape (n,), like the next three on one device (float32 if it has no float64).
        global_norm: as in `Step`, a float64 tensor of shape ().
        scale: as in `Step`, a number or a tensor of shape ().
        fires: bool tensor of shape (), True if the clip acts; None: it acts.
    """

    layers: Sequence[str]
    gradients: list[Tensor]
    parameters: Sequence[Tensor]
    columns: NDArray[np.intp]
    norms: Tensor
    global_norm: Tensor
    scale: Any = 1.0
    fires: Tensor | None = None

    @property
    def acts(self) -> Tensor:
        """Whether the clip changes the gradients, as a bool tensor of shape (): it fires, and the norm is finite."""
        finite = self.global_norm < math.inf  # a norm is never negative, and this is one kernel instead of four
        return finite if self.fires is None else finite & self.fires


class Baseline(Protocol):
    """The state of a clip whose bound is computed from the run so far."""

    def clip(self, history: History, rows: int) -> Clip | None:
        """Return the clip with the bound that follows from the first ``rows`` rows of the run; None if it is not known yet."""


class Clip(Settings):
    """The base class of clips. Your own clip implements `apply` and `loosened`, and `apply_unread` for devices.

    Attributes:
        looks_inside: True if it works on single elements or units, so that the norm has to be measured again afterwards.
        by_layer: True if it scales each layer by the layer's own norm.
        takes_threshold: True if `at_norm` can set its bounds.
        needs_whole_layers: True if it cannot work on shards of layers.
    """

    looks_inside: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    takes_threshold: ClassVar[bool] = False
    needs_whole_layers: ClassVar[bool] = False

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, value) for name, value in super().__repr_args__() if name != "layers" or value)

    @property
    def own(self) -> bool:
        """True for a clip that is defined outside gradwatch and may therefore fail in a single process."""
        return not type(self).__module__.startswith("gradwatch.clips.")

    def apply(self, step: Step) -> float:
        """Clip the step's gradients in place and return their global norm after clipping over the norm before.

        If the norm is not finite, nothing is changed, because the factor would make all gradients non-finite.
        """
        raise NotImplementedError

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """Clip the gradients on their device if ``step.fires``; return the norm after over the norm before, shape ().

        Nothing is read on the host.
        """
        raise NotImplementedError

    def loosened(self, factor: float) -> Self:
        """Return the same clip with bounds ``factor`` times as wide."""
        raise NotImplementedError

    def baseline(self) -> Baseline | None:
        """Return a new `Baseline`, which computes the bound from the run; None for a clip with bounds of its own."""
        return None

    def at_norm(self, norm: float, history: History) -> Clip:
        """Return the same clip with bounds that limit gradients whose global norm exceeds ``norm``."""
        raise NotImplementedError

    def check(self, layers: Sequence[str]) -> None:
        """Raise a `UsageError` if the clip cannot work on layers with these names."""


class OneFactor(Clip):
    """A clip that multiplies all gradients by one factor and so keeps their direction."""

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def factor(self, global_norm: float) -> float:
        """Return the factor for gradients whose global norm is finite."""
        raise NotImplementedError

    def factor_of(self, global_norm: Tensor) -> Tensor:
        """Return the factor as a tensor on the norm's device; the value is arbitrary if the norm is not finite."""
        raise NotImplementedError

    def factor_unread(self, step: UnreadStep) -> Tensor:
        """Return the factor on the device; 1 if the norm is not finite or the clip does not act."""
        return torch.where(step.acts, self.factor_of(step.global_norm), 1.0)

    def apply(self, step: Step) -> float:
        """Multiply all gradients by `factor` and return it; return 1.0 and change nothing if the norm is not finite."""
        factor = self.factor(step.global_norm) if math.isfinite(step.global_norm) else 1.0
        if factor != 1.0:
            scale_by(step.gradients, factor)
        return factor

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """Multiply all gradients by `factor_unread` on their devices and return it."""
        factor = self.factor_unread(step)
        scale_by(step.gradients, factor)
        return factor


class FromHistory(Clip):
    """A clip whose bound is computed from the run's own norms. The clip stays frozen; its `baseline` keeps the state."""

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def apply(self, step: Step) -> float:  # noqa: ARG002
        """Raise a `UsageError`, because only the clips that the `baseline` returns have a bound."""
        raise UsageError(f"{self} has no bound without a history: use what its baseline().clip(history, rows) returns.")

    def baseline(self) -> Baseline:
        """Return a new `Baseline`, which computes the bound from the run."""
        raise NotImplementedError


class PerLayer(Clip):
    """A clip whose bound may differ from layer to layer.

    ``layers`` maps shell patterns of layer names (``"lstm.*"``) to bounds. The first pattern that matches a layer's name sets
    its bound; other layers get the clip's own bound.
    """

    layers: dict[str, float] = Field(default_factory=dict)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for pattern, bound in self.layers.items():
            if not bound > 0:
                raise UsageError(
                    f"{type(self).__name__}(layers={{{pattern!r}: {bound!r}}}): Input should be greater than 0."
                )

    def check(self, layers: Sequence[str]) -> None:
        """Raise a `UsageError` if a pattern in ``layers`` matches no layer name."""
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise UsageError(
                    f"{type(self).__name__} has bounds for {pattern!r}, but no layer has such a name."
                    f"{did_you_mean(pattern, layers)}"
                )

    def bounds(self, default: float, layers: Sequence[str], columns: NDArray[np.intp]) -> Floats:
        """Return the bound of each column in ``columns``, shape (n,)."""
        if not self.layers:
            return np.full(len(columns), default)
        bounds: Floats = _by_name(default, tuple(self.layers.items()), tuple(layers))[columns]
        return bounds

    def wider(self, factor: float) -> dict[str, float]:
        """Return ``layers`` with all bounds multiplied by ``factor``."""
        return {pattern: factor * bound for pattern, bound in self.layers.items()}


def news(history: History, seen: int, rows: int) -> slice:
    """Return the slice of the rows numbered ``seen`` to ``rows - 1`` in arrays over all rows that ``history`` keeps."""
    kept = min(history.rows, history.window)
    first = history.rows - kept
    return slice(max(seen - first, 0), max(rows - first, 0))


@lru_cache(maxsize=64)
def _by_name(default: float, patterns: tuple[tuple[str, float], ...], layers: tuple[str, ...]) -> Floats:
    return np.array(
        [next((bound for pattern, bound in patterns if fnmatchcase(name, pattern)), default) for name in layers]
    )


def scale_by(gradients: Sequence[Tensor], coefficient: float | Tensor) -> None:
    """Multiply every gradient by ``coefficient`` in place; gradients may be sparse and on several devices."""
    if isinstance(coefficient, float) and not _EXTREME < coefficient < 1 / _EXTREME:
        scale_by(gradients, math.sqrt(coefficient))
        scale_by(gradients, coefficient / math.sqrt(coefficient))
        return
    dense: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.layout is torch.strided:
            dense.setdefault(gradient.device, []).append(gradient)
        else:
            gradient.mul_(moved(coefficient, gradient.device) if isinstance(coefficient, torch.Tensor) else coefficient)
    for home, together in dense.items():
        # a 0-dim float32 tensor does not change the dtype of the gradients
        there = moved(coefficient, home, torch.float32) if isinstance(coefficient, torch.Tensor) else coefficient
        torch._foreach_mul_(together, there)


def scale_each(gradients: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each gradient by its element of ``factors``, shape (n,), in place. No value is read on the host."""
    everywhere = Copies(factors.to(torch.float32))
    dense: dict[torch.device, list[int]] = {}
    for index, gradient in enumerate(gradients):
        if gradient.layout is torch.strided:
            dense.setdefault(gradient.device, []).append(index)
        else:
            gradient.mul_(everywhere.on(gradient.device)[index])
    for home, indices in dense.items():
        here = everywhere.on(home).unbind()
        torch._foreach_mul_([gradients[index] for index in indices], [here[index] for index in indices])
