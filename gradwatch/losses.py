"""The loss of the coming step, from the best source there is."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from gradwatch.device import precise
from gradwatch.wrappers import local_of, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gradwatch.records import LossSource


class Losses:
    """What is known of the coming step's loss: what the user handed over, what backwards began from.

    Tensors are kept detached and read with the row, not at once. A loss that was read stays for a second optimizer's
    step, until the next one comes in. ``scaler`` is the gradient scaler of the step under way: roots carry its scale.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._given: list[Tensor | float] = []
        self._roots: list[Tensor] = []
        self._spent = False
        self._always = weakref.ref(scaler) if scaler is not None else None
        self.scaler: torch.amp.GradScaler | None = None

    @property
    def pending(self) -> bool:
        """True while a loss waits for its step."""
        return bool(self._roots) and not self._spent

    def give(self, loss: Tensor | SupportsFloat) -> None:
        """Take the user's own loss; it outranks every other source. Several of one step add up."""
        if self._spent:
            self.forget()
        self._given.append(loss.detach() if isinstance(loss, torch.Tensor) else float(loss))

    def add_root(self, root: Tensor) -> None:
        """Take the scalar that a backward began from; several of one step add up."""
        if self._spent:
            self.forget()
        self._roots.append(root)

    def unread(self, returned: Any) -> tuple[Tensor | float | None, LossSource]:
        """Return the same as `read`, as a tensor where its value would have to be waited for; None where none was seen."""
        self._spent = True
        if self._given:
            return _sum(self._given), "monitor.loss()"
        if isinstance(returned, (int, float)) or (isinstance(returned, torch.Tensor) and returned.numel() == 1):
            return _sum([returned]), "closure"
        if self._roots:
            scaler = self.scaler or (self._always() if self._always is not None else None)
            scale = scaler._get_scale_async() if scaler is not None else None
            total = _sum(self._roots)
            return (
                total if scale is None else total / scale.to(self._roots[0].device, non_blocking=True)
            ), "backward root"
        return None, "none"

    def read(self, returned: Any) -> tuple[float, LossSource]:
        """Return the loss and its source; ``returned`` is what a closure returned. NaN where none was seen."""
        self._spent = True
        if self._given:
            return sum(float(loss) for loss in self._given), "monitor.loss()"
        if isinstance(returned, (int, float)) or (isinstance(returned, torch.Tensor) and returned.numel() == 1):
            return float(returned), "closure"
        if self._roots:
            if (
                len(self._roots) == 1 and self.scaler is None and self._always is None
            ):  # as the lines below, on the hot path
                return self._roots[0].item(), "backward root"
            scaler = self.scaler or (self._always() if self._always is not None else None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            if scale == 0:  # halved until nothing was left: the scaled loss tells nothing
                return math.nan, "none"
            return sum(root.item() for root in self._roots) / scale, "backward root"
        return math.nan, "none"

    def spend(self) -> None:
        """The step was made without a row."""
        self._spent = True

    def forget(self) -> None:
        """Start anew."""
        self._given.clear()
        self._roots.clear()
        self._spent = False


def _sum(losses: Sequence[Tensor | float]) -> Tensor | float:
    """Add up losses, as a float64 tensor without dimensions if one of them is a tensor."""
    return sum(
        local_of(summed(loss.detach())).to(precise(loss.device)).reshape(()) if isinstance(loss, torch.Tensor) else loss
        for loss in losses
    )
