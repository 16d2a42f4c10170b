"""What an optimizer is given for one step: lower rates, a factor for its gradients, the order to leave the step out."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch import device

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

_ABSENT = object()  # stands for an attribute that did not exist


class Steering:
    """The attributes of an optimizer that are set for one step, and given back as they were.

    Attributes:
        used: whether anything is set now, so that `end` has something to do.
    """

    def __init__(self) -> None:
        self.used = False
        self._slowed: list[tuple[dict[str, Any], Any, Any]] = []
        self._born: tuple[weakref.ref[Optimizer], int, Tensor] | None = None
        self._lent: list[tuple[weakref.ref[Optimizer], str, Any, Tensor]] = []
        self._with_host: bool | None = None  # whether the optimizer has parameters on the CPU; None: not known

    def moved(self) -> None:
        """Record that the gradients, and perhaps the parameters, are not where they were."""
        self._with_host = None

    def slow(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply the learning rate of each parameter group by ``factor`` until `end` is called."""
        for group in optimizer.param_groups:
            if "lr" in group:
                lowered = group["lr"] * factor
                self.used = True
                self._slowed.append((group, group["lr"], lowered))
                group["lr"] = lowered

    def leave_to(self, optimizer: Optimizer, factor: Tensor | None, skip: Tensor | None) -> None:
        """Let a fused optimizer multiply its gradients by ``factor``, and leave the step out if ``skip``, without extra pass.

        Both are passed in the attributes that a `GradScaler` sets on the optimizer, combined with its own values.
        """
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if factor is not None:
            # a reciprocal is one kernel, a quotient of a number two
            divisor = torch.reciprocal(factor) if scale is None else device.moved(scale, factor.device) / factor
            self._lend(optimizer, "grad_scale", self._for_all_of(optimizer, divisor.to(torch.float32)))
        if skip is not None:
            found = skip.to(torch.float32)
            found = found if overflow is None else torch.maximum(found, device.moved(overflow, found.device))
            found = self._for_all_of(optimizer, found)
            self._lend(optimizer, "found_inf", found)
            self._born = weakref.ref(optimizer), len(optimizer.state), found

    def _for_all_of(self, optimizer: Optimizer, value: Tensor) -> Tensor:
        """Return a number from where the optimizer may copy it to all its parameters.

        It copies without waiting, so that for parameters on the CPU a number from a device would not have arrived yet.
        """
        if self._with_host is None:
            there = (parameter.is_cpu for group in optimizer.param_groups for parameter in group["params"])
            self._with_host = any(there)
        return device.moved(value, torch.device("cpu")) if self._with_host else value

    def _lend(self, optimizer: Optimizer, name: str, value: Tensor) -> None:
        self.used = True
        # None differs from absent: a `GradScaler` deletes what it has set, even None
        self._lent.append((weakref.ref(optimizer), name, vars(optimizer).get(name, _ABSENT), value))
        setattr(optimizer, name, value)

    def end(self) -> None:
        """Undo what was changed for a step."""
        self.used = False
        for group, rate, lowered in self._slowed:
            if group.get("lr") is lowered:  # where the step raised, somebody else may have set it since
                group["lr"] = rate
        self._slowed.clear()
        for ref, name, before, lent in reversed(self._lent):
            optimizer = ref()
            if optimizer is None or vars(optimizer).get(name) is not lent:
                continue
            if before is _ABSENT:
                del vars(optimizer)[name]
            else:
                setattr(optimizer, name, before)
        self._lent.clear()
        if self._born is not None:
            self._clear_born()

    def _clear_born(self) -> None:
        """Zero the momenta that were created in a step that was left out, which torch's fused SGD leaves uninitialised."""
        assert self._born is not None
        (ref, before, found), self._born = self._born, None
        optimizer = ref()
        if optimizer is None or len(optimizer.state) == before:
            return
        for state in list(optimizer.state.values())[before:]:
            momentum = state.get("momentum_buffer")
            if isinstance(momentum, torch.Tensor):
                momentum.masked_fill_(device.moved(found, momentum.device, torch.bool), 0)


def is_fused(optimizer: Optimizer | None) -> bool:
    """Return whether the optimizer can leave out a step on the device, which fused optimizers can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
