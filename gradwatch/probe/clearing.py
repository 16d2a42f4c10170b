"""Programs that clear gradients at the wrong time: never, so that updates use the sum of all so far, or before the step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradwatch import device
from gradwatch.measure.norms import unfit
from gradwatch.measure.wrappers import version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from gradwatch.probe.gradients import Gradients

    Before = Sequence[tuple[Tensor, int] | None]

_ENOUGH = 8  # steps in a row after which it is told
_LONGEST = 64  # steps of all optimizers after which it is no longer looked for


@dataclass(slots=True)
class _Left:
    """The first gradient of an optimizer, as its last step has left it."""

    gradient: weakref.ref[Tensor]
    version: int | None  # None once a backward has added to it
    there: bool = True  # when the last backward began
    steps: int = 0  # in a row over which it was there


class Clearing:
    """Looks at the gradients of each optimizer in the first steps: after a step, around each backward, before the next step.

    Args:
        told: called once with a sentence if an optimizer's gradients are never cleared, or cleared before its steps.

    Attributes:
        watches: True until it was told, or not seen for long.
    """

    def __init__(self, told: Callable[[str], object]) -> None:
        self._told = told
        self._steps = 0
        # None: the program clears them
        self._left: weakref.WeakKeyDictionary[Gradients, _Left | None] = weakref.WeakKeyDictionary()
        # to which the last backward has brought gradients
        self._brought: weakref.WeakSet[Gradients] = weakref.WeakSet()
        self._emptied: weakref.WeakKeyDictionary[Gradients, int] = weakref.WeakKeyDictionary()  # steps in a row
        self.watches = True

    def begins(self, owner: Gradients, before: Before) -> None:
        """Look at that gradient among those ``before`` a backward that begins, which may reach the optimizer's parameters."""
        left = self._left.get(owner)
        if left is None:
            return
        gradient, version = next((one for one in before if one is not None), (None, -1))
        left.there = (
            gradient is not None
            and gradient is left.gradient()
            and left.version in (None, version)
            and bool(gradient.any())  # `grad.data.zero_()` leaves the version as it is
        )

    def reached(self, owner: Gradients) -> None:
        """Record that the backward has changed gradients of the optimizer."""
        if any(_is_there(one.grad) for one in owner.parameters):
            self._brought.add(owner)
        else:
            self._brought.discard(owner)
        left = self._left.get(owner)
        if left is not None and not left.there:
            self._left[owner] = None
        elif left is not None:
            left.version = None

    def comes(self, owner: Gradients) -> None:
        """Count a step that is about to be made without any of the gradients that the last backward has brought."""
        if owner.hidden or owner.sharded or owner not in self._brought or owner.coming.before_clip is not None:
            return  # a clip whose norm has overflowed leaves zeros too
        gradients = [one.grad for one in owner.parameters if one.grad is not None]
        emptied = all(_can_be_read(one) and not one.any() for one in gradients)
        self._emptied[owner] = self._emptied.get(owner, 0) + 1 if emptied else 0
        # one of several may be kept from training so for a while
        if self._emptied[owner] == _ENOUGH and len(self._left) <= 1:
            self.watches = False
            self._told(
                f"gradients are cleared between backward() and optimizer.step(): in {_ENOUGH} steps in a row, the optimizer got "
                "none of those that the backward had brought. Call optimizer.zero_grad() before backward(), or after the step."
            )

    def stepped(self, owner: Gradients) -> None:
        """Count a step over which the gradients were never cleared, and remember the first one as it is now."""
        self._brought.discard(owner)
        self._steps += 1
        self.watches = self._steps <= _LONGEST
        left = self._left.get(owner)
        if owner.hidden or owner.sharded or (left is None and owner in self._left):
            return
        steps = left.steps + (left.version is None) if left is not None else 0
        gradient = next((one.grad for one in owner.parameters if one.grad is not None), None)
        if gradient is None or not _can_be_read(gradient):
            self._left[owner] = None
            return
        self._left[owner] = _Left(weakref.ref(gradient), version_of(gradient), steps=steps)
        if steps == _ENOUGH:
            self.watches = False
            self._told(
                f"gradients are not cleared: over {_ENOUGH} steps in a row, each backward has added to those of earlier steps, "
                "so that updates use the sum of all gradients so far. Call optimizer.zero_grad() in each step."
            )


def _is_there(gradient: Tensor | None) -> bool:
    """Return whether there is a gradient, and one above zero where that can be read without waiting."""
    return gradient is not None and (not _can_be_read(gradient) or bool(gradient.any()))


def _can_be_read(gradient: Tensor) -> bool:
    strided = gradient.layout is torch.strided and unfit(gradient) is None
    return strided and device.reading_is_free(gradient.device) and not gradient.is_inference()
