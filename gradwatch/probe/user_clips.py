"""The user's own clips: the gradients are measured before them, and three mistakes in their order are reported."""

from __future__ import annotations

import inspect
import math
import weakref
from typing import TYPE_CHECKING

import torch.nn.utils.clip_grad as torch_clip

from gradwatch import device
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from torch import Tensor

    from gradwatch.probe.attribution import Attribution
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.owners import Owners
    from gradwatch.probe.step_recorder import StepRecorder
    from gradwatch.probe.update_loop import UpdateLoop

_AFTER_STEP = (
    "your clip comes after optimizer.step(): it changes gradients that the step has already used. Move it between backward() and "
    "step()."
)
_EARLY = (
    "your clip comes before backward(): in {} steps in a row it found no gradient, and the step used those that backward() "
    "brought after it. Move it between backward() and step()."
)
_ENOUGH = 8  # steps in a row after which that is told
_DEEP = 16  # frames among which the function by which the user clips is looked for


class UserClips:
    """What the user's own clips do to the coming steps.

    Args:
        owners: the owners of the gradients.
        attribution: knows on which threads the model is trained.
        recorder: keeps the norms before a clip.
        loop: knows what makes the updates.
        judge: is told of mistakes.

    Attributes:
        early: number of steps in a row of each owner before which the clip of its parameters found no gradient.
    """

    def __init__(
        self, owners: Owners, attribution: Attribution, recorder: StepRecorder, loop: UpdateLoop, judge: Judge
    ) -> None:
        self._owners = owners
        self._attribution = attribution
        self._recorder = recorder
        self._loop = loop
        self._judge = judge
        self._strange = 0  # gradients in the clip that do not belong to the model
        self._told: set[str] = set()
        self._nothing: weakref.WeakSet[Gradients] = weakref.WeakSet()  # since the last step
        self.early: weakref.WeakKeyDictionary[Gradients, int] = weakref.WeakKeyDictionary()

    def begins(self, gradients: Sequence[Tensor]) -> None:
        """Measure the gradients that the user is about to clip."""
        if self._attribution.is_elsewhere():
            return
        clipped = set(map(id, gradients))
        self._owners.look_at_optimizers()
        strange = self._strangers(clipped)
        if strange and strange != self._strange:  # they may belong to layers that were just added or unfrozen
            self._owners.look_again()
            self._owners.look_at_the_rest()
            self._strange = self._strangers(clipped)
        hit = [one for one in self._owners.current() if any(id(each.grad) in clipped for each in one.parameters)]
        for owner in hit:
            self._recorder.measure_before_clip(owner)
            self.early.pop(owner, None)
        late = bool(hit) and self._loop.kind == "optimizer" and all(owner.coming.spent for owner in hit)
        if late and "late" not in self._told and _is_a_clip():
            self._tell("late", _AFTER_STEP)

    def _strangers(self, clipped: set[int]) -> int:
        return len(clipped - {id(one.grad) for owner in self._owners.current() for one in owner.parameters})

    def total_of(self, gradients: list[Tensor]) -> Tensor | None:
        """Return the L2 norm of gradients that the user is about to clip, as one vector; None if torch has to compute it."""
        return None if self._attribution.is_elsewhere() else self._recorder.share_norm(gradients)

    def ends(self, total: Tensor, max_norm: float) -> None:
        """Record that the user has clipped gradients of the norm ``total`` to ``max_norm``."""
        self._recorder.user_scaled(total, max_norm)
        for owner in self._owners.current():
            if owner.coming.before_clip is not None:
                owner.coming.before_clip.ended(max_norm if isinstance(max_norm, (int, float)) else None)

    def found_nothing(self, parameters: Sequence[Tensor]) -> None:
        """Record that the user has clipped parameters none of which has a gradient."""
        given = set(map(id, parameters))
        for owner in self._owners.current():
            if "early" not in self._told and not owner.hidden and any(id(one) in given for one in owner.parameters):
                self._nothing.add(owner)
                self.early.setdefault(owner, 0)

    def stepped(self, owner: Gradients) -> None:
        """Count a step of an owner with gradients that came after such a clip."""
        if owner not in self._nothing:
            return
        self._nothing.discard(owner)
        self.early[owner] = self.early.get(owner, 0) + any(one.grad is not None for one in owner.parameters)
        if self.early[owner] == _ENOUGH:
            self._tell("early", _EARLY.format(_ENOUGH))
            self.early.clear()

    def unscaled(self, mine: Gradients, scale: Tensor | None) -> None:
        """Divide the norms before the user's clip by ``scale``, which the gradients still have; None: they have none."""
        if scale is None:
            return
        self._recorder.settle_norms()
        before = mine.coming.before_clip
        if before is None or before.measured is None or not before.holds:
            return
        known = scale.item() if device.reading_is_free(scale.device) else None
        acted, bound = before.acted, before.bound
        before.divide(scale if known is None else known)
        if acted:
            self._tell("scaled", _before_unscaling(bound, known))

    def _tell(self, mistake: str, text: str) -> None:
        if mistake not in self._told:
            self._told.add(mistake)
            self._judge.mistake(text)


def _before_unscaling(bound: float | None, scale: float | None) -> str:
    """Return that the user's clip to ``bound`` came before ``unscale_``, with the loss scale if it is known."""
    by = f" ({number(scale)})" if scale is not None else ""
    begin = "your clip comes before scaler.unscale_(optimizer), so that"
    if bound is None or scale is None:
        told = f"{begin} its bound is compared with gradients multiplied by the loss scale{by}"
    else:
        told = f"{begin} its bound of {number(bound)} is compared with gradients multiplied by the loss scale{by}: it acts like "
        told += f"{number(bound / scale)}"
    return f"{told}. Call scaler.unscale_(optimizer) before it."


def _is_a_clip() -> bool:
    """Return whether this is called from a function of torch that clips, and not from one that only measures a norm."""
    frame: FrameType | None = inspect.currentframe()
    for _ in range(_DEEP):
        if frame is None:
            return False
        code = frame.f_code
        if code.co_filename == torch_clip.__file__:
            if code.co_name == "clip_grad_value_":
                return True
            if code.co_name in ("_clip_grads_with_norm_", "clip_grad_norm_"):
                bound = frame.f_locals.get("max_norm")
                return not isinstance(bound, (int, float)) or bound < math.inf
        frame = frame.f_back
    return False
