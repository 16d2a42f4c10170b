"""The parameters of an optimizer, compared with those that it holds later."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class Held:
    """The parameters of an optimizer at one moment."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
        self._single = [
            (number, index)
            for number, group in enumerate(self._groups)
            for index, parameter in enumerate(group)
            if parameter.numel() == 1
        ]

    def is_held_by(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer still holds the same parameters in the same order.

        Comparing lists takes a nanosecond for each element that is the same object in both. Comparing two different tensors
        gives a tensor, which has a truth value only if it has one element; those elements are compared by identity.
        """
        groups = optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        try:
            for group, held in zip(groups, self._groups, strict=True):
                if group["params"] != held:
                    return False
        except Exception:  # of any kind: the tensors are not the same object
            return False
        return all(groups[number]["params"][index] is self._groups[number][index] for number, index in self._single)
