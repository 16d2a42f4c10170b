"""The loss of the coming step, from the best available source."""

from __future__ import annotations

import math
import weakref
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from gradwatch import device
from gradwatch.measure.readback import PATIENCE
from gradwatch.measure.wrappers import local_of, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gradwatch.probe.coming import Coming, Loss, Root
    from gradwatch.records import LossSource


class LossReader:
    """Reads the loss of a step: the user's own, that of a closure, or the roots of backwards (`gradwatch.probe.coming.Coming`).

    Args:
        scaler: the gradient scaler; None: it is found when it steps.

    Attributes:
        given: losses passed to `give`. They hold for the next step of each optimizer, until others are given.
        scaler: gradient scaler of the step under way, by whose scale roots of backwards are divided; None outside its steps.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.given: list[Loss] = []
        self._stepped: list[Coming] = []  # steps that have used the given losses
        self._always = weakref.ref(scaler) if scaler is not None else None
        self.scaler: torch.amp.GradScaler | None = None

    def give(self, loss: Tensor | SupportsFloat) -> None:
        """Add a loss of the user, which takes precedence over every other source. Several of one step are summed."""
        if device.capturing():
            return
        if self._stepped:
            self.forget()
        self.given.append(loss.detach().clone() if isinstance(loss, torch.Tensor) else float(loss))

    def scaled_by(self, scaler: torch.amp.GradScaler | None) -> None:
        """Set the gradient scaler of the step under way; None when the step is over."""
        self.scaler = scaler

    def loss_scale(self) -> float:
        """Return the factor of the gradient scaler that makes the step under way; NaN if there is none."""
        return self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else math.nan

    def unread_loss_scale(self) -> Tensor | None:
        """Return the same as `loss_scale`, as a tensor on the device of the scaler; None if there is none."""
        return self.scaler._get_scale_async() if self.scaler is not None else None

    def patience(self, *, found: bool) -> int:
        """Return how many steps in a row the scaler may leave out before one of them is judged.

        At first, as many as it may take to lower its scale to 1, below which none helps. ``found``: a step was made since.
        """
        scaler = None if found else self._scaler()
        if scaler is None or not 0 < scaler._backoff_factor < 1:
            return PATIENCE
        return max(PATIENCE, math.ceil(math.log(max(scaler._init_scale, 1.0)) / -math.log(scaler._backoff_factor)))

    def forget(self) -> None:
        """Discard the given losses."""
        self.given.clear()
        self._stepped.clear()

    def backward_came(self) -> None:
        """Discard the given losses when a backward comes after a step that used them."""
        if self._stepped:
            self.forget()

    def used(self, coming: Coming) -> None:
        """Record that a step has been made with the given losses."""
        if self.given and self._holds_for(coming):
            self._stepped.append(coming)

    def unread(self, coming: Coming, returned: Any, home: torch.device) -> tuple[Loss | None, LossSource]:
        """Return the same as `read`, as a tensor on ``home`` if its value is on a device; None if no loss was seen."""
        if self._holds_for(coming):
            return _sum(self.given, home), "monitor.loss()"
        if _is_number(returned):
            return _sum([returned, *self._unscaled(coming.earlier, home)], home), "closure"
        if coming.roots:
            return _sum(self._unscaled(coming.roots, home), home), "backward root"
        return None, "none"

    def read(self, coming: Coming, returned: Any) -> tuple[float, LossSource]:
        """Return the loss of a coming step and its source; NaN if none was seen.

        ``returned`` is the return value of a closure. To it are added the losses of backwards before the closure whose
        gradients the closure did not clear.
        """
        if self.given and self._holds_for(coming):
            return sum(map(_number, self.given)), "monitor.loss()"
        if returned is not None and _is_number(returned):
            return _number(returned) + (self._total(coming.earlier) or 0.0), "closure"
        loss = self._total(coming.roots)
        return (math.nan, "none") if loss is None else (loss, "backward root")

    def _holds_for(self, coming: Coming) -> bool:
        return bool(self.given) and not any(one is coming for one in self._stepped)

    def _scaler(self) -> torch.amp.GradScaler | None:
        return self.scaler or (self._always() if self._always is not None else None)

    def _total(self, roots: Sequence[Root]) -> float | None:
        """Return the sum of the losses without the loss scale; None if it is not known."""
        if len(roots) == 1 and self.scaler is None and self._always is None and isinstance(roots[0][0], float):
            return roots[0][0]  # as the lines below, on the hot path
        if not roots or any(isinstance(loss, torch.Tensor) and loss.is_meta for loss, _ in roots):
            return None
        scaler = self._scaler()
        scale = scaler.get_scale() if scaler is not None else 1.0
        if scale == 0:  # halved until it underflowed: the scaled loss contains nothing
            return None
        return sum(_number(loss) for loss, _ in roots) / scale

    def _unscaled(self, roots: Sequence[Root], home: torch.device) -> list[Loss]:
        losses = [loss for loss, _ in roots]
        scaler = self._scaler()
        scale = scaler._get_scale_async() if scaler is not None else None
        return losses if scale is None or not losses else [_sum(losses, home) / device.moved(scale, home)]


def _is_number(returned: Any) -> bool:
    return isinstance(returned, (int, float)) or (isinstance(returned, torch.Tensor) and returned.numel() == 1)


def _number(loss: Loss) -> float:
    return float(loss.item()) if isinstance(loss, torch.Tensor) else float(loss)


def _sum(losses: Sequence[Loss], home: torch.device) -> Loss:
    """Return the sum of losses; if one is a tensor, as a tensor without dimensions on ``home``, in its widest float type."""
    parts = (
        device.moved(local_of(summed(loss.detach())), home, device.widest_float(home)).reshape(())
        if isinstance(loss, torch.Tensor)
        else loss
        for loss in losses
    )
    return reduce(add, parts)  # unlike `sum`, it does not begin with 0, which would be a kernel more
