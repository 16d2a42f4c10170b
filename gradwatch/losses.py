"""The loss of the coming step, from the best source there is."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Losses:
    """What is known of the coming step's loss: what the user handed over, what backwards began from.

    Tensors are kept detached and read with the row, not at once. ``scaler`` is the gradient scaler, when one is known:
    the roots of backward carry its scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._given: Tensor | float | None = None
        self._roots: list[Tensor] = []
        self._scaler = weakref.ref(scaler) if scaler is not None else None

    def give(self, loss: Tensor | float) -> None:
        """Take the user's own loss; it outranks every other source."""
        self._given = loss.detach() if isinstance(loss, torch.Tensor) else float(loss)

    def add_root(self, root: Tensor) -> None:
        """Take the scalar that a backward began from; several of one step add up."""
        self._roots.append(root)

    def scaled_by(self, scaler: torch.amp.GradScaler) -> None:
        """Learn which gradient scaler scales the roots."""
        self._scaler = weakref.ref(scaler)

    def read(self, returned: Any) -> tuple[float, Literal["monitor.loss()", "closure", "backward root", "none"]]:
        """Return the loss and its source; ``returned`` is what a closure returned. NaN where none was seen."""
        if self._given is not None:
            return float(self._given), "monitor.loss()"
        if isinstance(returned, (int, float)) or (isinstance(returned, torch.Tensor) and returned.numel() == 1):
            return float(returned), "closure"
        if self._roots:
            scaler = self._scaler() if self._scaler is not None else None
            scale = scaler.get_scale() if scaler is not None else 1.0
            return sum(root.item() for root in self._roots) / scale, "backward root"
        return math.nan, "none"

    def forget(self) -> None:
        """Start anew for the next step."""
        self._given = None
        self._roots.clear()
