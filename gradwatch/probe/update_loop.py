"""How a training makes its updates: by a torch optimizer, by code of its own after each backward, or where the user says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from gradwatch import device
from gradwatch.measure.norms import norm_of
from gradwatch.measure.wrappers import optimizers_alive, version_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.measure.layers import Layers

_UNDECIDED = 16  # steps of optimizers without watched layers after which the model is assumed to have no optimizer
_IN_PLACE = 32  # steps in a row of optimizers of other parameters after which the model's own is taken to be out of use


class UpdateLoop:
    """Finds out how one training makes its updates.

    Args:
        layers: the watched parameters.

    Attributes:
        kind: where rows are made: at steps of torch optimizers, at ends of backwards, or where the user says.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.kind: Literal["unknown", "optimizer", "backward", "explicit"] = "unknown"
        self._has_optimizer = False
        self._vain_steps = self._vain_at = self._moves = self._in_place = 0
        self._awaited = False
        self._weights_then = math.nan

    def owns_any(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer holds at least one watched parameter."""
        return any(self._layers.column(p) is not None for group in optimizer.param_groups for p in group["params"])

    def optimizer_found(self) -> None:
        """Record that there is a torch optimizer of watched parameters."""
        self._has_optimizer = True

    def optimizer_steps(self) -> None:
        """Make rows at the steps of torch optimizers, unless the user says where updates happen."""
        if self.kind != "explicit":
            self.kind = "optimizer"

    def user_steps(self) -> None:
        """Make rows only where the user says that the update is about to happen."""
        self.kind = "explicit"

    def stepped_in_vain(self, backwards: int, used: int) -> bool:
        """Count a step of an optimizer that owns no watched parameter, if a backward of the model came since the last one.

        Return whether such steps have taken the place of those of the model's own optimizer.

        Args:
            backwards: number of backwards of the model so far.
            used: number of those before the last step of an optimizer of its own.
        """
        if backwards > self._vain_at:
            self._in_place = 1 if self._vain_at <= used else self._in_place + 1
            self._vain_steps, self._vain_at = self._vain_steps + 1, backwards
        return self.kind == "optimizer" and self._in_place == _IN_PLACE

    def backward_ended(self) -> bool:
        """Return whether a row is to be made now, at the end of a backward, because no torch optimizer makes the update.

        The first update is not recorded: until it has happened, it is not known that no optimizer is in use.
        """
        if self.kind in ("explicit", "optimizer") or self._has_optimizer:
            return False
        if self.kind == "unknown" and not self._look_for_updates():
            return False
        self.kind = "backward"
        return True

    def _look_for_updates(self) -> bool:
        """Return whether the weights changed without an optimizer of theirs, or only optimizers of other parameters step."""
        parameters = [parameter for _, parameter in self._layers.measured()]
        if all(device.reading_is_free(parameter.device) for parameter in parameters):
            now = sum(norm_of(parameter) for parameter in parameters)
        else:  # torch counts the in-place changes of each tensor
            now = float(sum(version_of(parameter) for parameter in parameters))
        then, self._weights_then = self._weights_then, now
        if self._vain_steps >= _UNDECIDED:
            return True
        if math.isnan(then) or now == then:
            return False
        self._moves += 1
        if self._moves == 1 and any(self.owns_any(optimizer) for optimizer in optimizers_alive()):
            self._awaited = True  # SAM moves the weights before its first step
        return not self._awaited or self._moves > _UNDECIDED
