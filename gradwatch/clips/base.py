"""What a clip is: frozen bounds and one function that changes gradients in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field

from gradwatch.errors import UsageError, did_you_mean
from gradwatch.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

    from gradwatch.history.history import History
    from gradwatch.records import Floats

_EXTREME = 1e-30  # a factor beyond which float32 runs out of digits, so that it is put on in two halves


@dataclass(slots=True)
class Step:
    """One step's gradients, and what is known of them already: nothing of it is measured again.

    Args:
        layers: the names of all L columns.
        gradients: n tensors, of sharded ones the part that this process holds; a clip changes them in place.
        parameters: theirs.
        columns: their columns, shape (n,).
        norms: their L2 norms, of the whole layers, without a loss scale, shape (n,).
        global_norm: the L2 norm of all as one vector, without it.
        scale: the loss scale that is still on them.
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
    """The same on a device, where nothing is read.

    Args:
        layers, gradients, parameters, columns: as in `Step`.
        norms: float64, shape (n,).
        global_norm: float64, no dimensions.
        scale: a number or a tensor without dimensions.
        fires: whether to act, bool, no dimensions; None: yes.
    """

    layers: Sequence[str]
    gradients: list[Tensor]
    parameters: Sequence[Tensor]
    columns: NDArray[np.intp]
    norms: Tensor
    global_norm: Tensor
    scale: Any = 1.0
    fires: Tensor | None = None


class Baseline(Protocol):
    """What a clip whose bound follows from the run itself knows of the run so far."""

    def clip(self, history: History, rows: int) -> Clip | None:
        """Return the clip of this moment, from the first ``rows`` rows ever of a run; None: it cannot be told yet."""


class Clip(Settings):
    """A way to change gradients. One of your own has `apply` and `loosened`, and `apply_unread` for devices.

    Class variables:
        keeps_direction: it multiplies all gradients by one factor.
        looks_inside: at single elements or units, so that only measuring again tells what is left of the norm.
        by_layer: it treats layers by their own norms.
        takes_threshold: its bounds can be set by `at_norm`.
        needs_whole_layers: it cannot work on parts of layers, as sharded trainings hold them.
    """

    keeps_direction: ClassVar[bool] = False
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
        """True for a clip of the user's own, which may fail in one of several processes alone."""
        return not type(self).__module__.startswith("gradwatch.clips.")

    def apply(self, step: Step) -> float:
        """Change the step's gradients in place; return their global norm after over the one before.

        Where that norm is not finite nothing is changed: what is not finite would spread.
        """
        raise NotImplementedError

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """Do the same on a device, and only where ``step.fires``; return the norm after over before, no dimensions."""
        raise NotImplementedError

    def loosened(self, factor: float) -> Self:
        """Return the same clip with its bounds ``factor`` times as wide."""
        raise NotImplementedError

    def baseline(self) -> Baseline | None:
        """Return a fresh memory of the run, for a clip whose bound follows from it; None: its bounds are its own."""
        return None

    def at_norm(self, norm: float, history: History) -> Clip:
        """Return the same clip with its bounds where they stop a gradient whose global norm is above ``norm``."""
        raise NotImplementedError

    def check(self, layers: Sequence[str]) -> None:
        """Raise a `UsageError` where the clip cannot work on layers of these names."""


class OneFactor(Clip):
    """A clip that multiplies all gradients by one factor: their direction is kept."""

    keeps_direction: ClassVar[bool] = True

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def factor(self, global_norm: float) -> float:
        """Return the factor for gradients of a finite norm."""
        raise NotImplementedError

    def factor_of(self, global_norm: Tensor) -> Tensor:
        """Return the same on a device; any value where the norm is not finite."""
        raise NotImplementedError

    def factor_unread(self, step: UnreadStep) -> Tensor:
        """Return the factor on the device; 1 where the norm is not finite or the clip does not act."""
        acts = torch.isfinite(step.global_norm)
        return torch.where(acts if step.fires is None else acts & step.fires, self.factor_of(step.global_norm), 1.0)

    def apply(self, step: Step) -> float:
        """See `Clip.apply`."""
        factor = self.factor(step.global_norm) if math.isfinite(step.global_norm) else 1.0
        if factor != 1.0:
            scale_by(step.gradients, factor)
        return factor

    def apply_unread(self, step: UnreadStep) -> Tensor:
        """See `Clip.apply_unread`."""
        factor = self.factor_unread(step)
        scale_by(step.gradients, factor)
        return factor


class FromHistory(Clip):
    """A clip whose bound follows from the run's own norms. What it knows of them is its `baseline`'s, so that it stays frozen."""

    def __init__(self, **bounds: Any) -> None:
        super().__init__(**bounds)

    def apply(self, step: Step) -> float:  # noqa: ARG002
        """See `Clip.apply`: of its own it has no bound."""
        raise UsageError(f"{self} has no bound without a history: use what its baseline().clip(history, rows) returns.")

    def baseline(self) -> Baseline:
        """See `Clip.baseline`."""
        raise NotImplementedError


class PerLayer(Clip):
    """A clip with a bound that may differ from layer to layer, by patterns of their names.

    ``layers`` maps patterns as in a shell (``"lstm.*"``) to bounds; the first that matches counts, elsewhere the clip's own.
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
        """See `Clip.check`: a pattern that matches no layer is a slip."""
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise UsageError(
                    f"{type(self).__name__} has bounds for {pattern!r}, and no layer has such a name."
                    f"{did_you_mean(pattern, layers)}"
                )

    def bounds(self, default: float, layers: Sequence[str], columns: NDArray[np.intp]) -> Floats:
        """Return the bound of each of these columns, shape (n,)."""
        if not self.layers:
            return np.full(len(columns), default)
        bounds: Floats = _by_name(default, tuple(self.layers.items()), tuple(layers))[columns]
        return bounds

    def wider(self, factor: float) -> dict[str, float]:
        """Return ``layers`` with bounds ``factor`` times as wide."""
        return {pattern: factor * bound for pattern, bound in self.layers.items()}


def news(history: History, seen: int, rows: int) -> slice:
    """Return where, in arrays over all rows that ``history`` keeps, those from number ``seen`` up to ``rows`` stand."""
    kept = min(history.rows, history.window)
    first = history.rows - kept
    return slice(max(seen - first, 0), max(rows - first, 0))


@lru_cache(maxsize=64)
def _by_name(default: float, patterns: tuple[tuple[str, float], ...], layers: tuple[str, ...]) -> Floats:
    return np.array(
        [next((bound for pattern, bound in patterns if fnmatchcase(name, pattern)), default) for name in layers]
    )


def scale_by(gradients: Sequence[Tensor], coefficient: float | Tensor) -> None:
    """Multiply every gradient by ``coefficient``, in place; sparse ones too, on whatever devices they are."""
    if isinstance(coefficient, float) and not _EXTREME < coefficient < 1 / _EXTREME:
        scale_by(gradients, math.sqrt(coefficient))
        scale_by(gradients, coefficient / math.sqrt(coefficient))
        return
    dense: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.layout is torch.strided:
            dense.setdefault(gradient.device, []).append(gradient)
        else:
            gradient.mul_(coefficient)
    for device, together in dense.items():
        # a 0-dim tensor of float32 leaves the gradients' own dtype as it is
        there = (
            coefficient.to(device, torch.float32, non_blocking=True)
            if isinstance(coefficient, torch.Tensor)
            else coefficient
        )
        torch._foreach_mul_(together, there)
