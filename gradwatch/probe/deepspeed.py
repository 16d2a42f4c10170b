"""The steps of DeepSpeed's own optimizers, by a patch of their ``step``.

The optimizer is patched rather than the engine, since Trainers call ``engine.step()`` inside their own backward. What it holds is
known by `gradwatch.measure.deepspeed`.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any

from gradwatch.errors import UsageError
from gradwatch.measure.deepspeed import refusal
from gradwatch.probe.patches import Patch, tell
from gradwatch.probe.zero_gradients import EngineSkip, ZeroGradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.optimizer_hooks import StepListener
    from gradwatch.probe.owners import Owners
    from gradwatch.probe.patches import Function

# steps of other optimizers after which DeepSpeed is looked for, which may have been started after the monitor
_LOOKS = 4


class DeepSpeed:
    """The patches of DeepSpeed for one probe, which is held weakly.

    Args:
        probe: is told of the steps of DeepSpeed's own optimizer as of those of a torch optimizer.
        layers: the watched parameters.
        owners: the owners of the parameters.
    """

    def __init__(self, probe: StepListener, layers: Layers, owners: Owners) -> None:
        self._probe = weakref.ref(probe)
        self._layers = layers
        self._owners = owners
        self._patches: list[Patch] = []
        self._looks = _LOOKS

    def start(self) -> None:
        """Patch what trains the model: the step of DeepSpeed's own optimizer, and the clip before that of a torch optimizer."""
        module, zero = sys.modules.get("deepspeed.runtime.engine"), self._layers.zero
        if module is not None:
            self._listen(module.DeepSpeedEngine, "clip_fp32_gradients", _wrap_clip)
        if zero is not None:
            self._owners.find(zero.optimizer)
            self._owners.find(zero.inner)
            owner = next(kind for kind in type(zero.optimizer).__mro__ if "step" in vars(kind))
            self._listen(owner, "step", _wrap_step)

    def stop(self) -> None:
        """Remove the patches, and what says of an optimizer that its last step was left out."""
        for owner in self._owners.current() if self._patches else ():
            if isinstance(owner.skip, EngineSkip):
                owner.skip.unmark()
        for patch in self._patches:
            patch.remove(self)
        self._patches.clear()

    def _listen(self, owner: type, attribute: str, wrap: Callable[[Function, Patch], Function]) -> None:
        patch = _patches.setdefault(owner, Patch(f"{owner.__name__}.{attribute}", owner, attribute, wrap))
        if patch not in self._patches:
            patch.add(self)
            self._patches.append(patch)

    def appears(self) -> bool:
        """Return whether an optimizer of DeepSpeed has been made after the monitor; its next step is the first that is seen.

        Raises:
            UsageError: it cannot be watched.
        """
        if self._layers.zero is not None or not self._looks or "deepspeed" not in sys.modules:
            return False
        self._looks -= 1
        model = self._layers.model
        reason = refusal(model) if model is not None else None
        if reason is not None:
            raise UsageError(f"this model cannot be watched: {reason}.")
        found = self._layers.meet_zero()
        if found:
            self.start()
        return found

    # Called by the patches.

    def failed(self, error: Exception) -> None:
        """Handle an error as the probe does."""
        if (probe := self._probe()) is not None:
            probe.failed(error)

    def user_clips(self, gradients: list[Tensor]) -> None:
        """Measure the gradients that DeepSpeed is about to clip."""
        if (probe := self._probe()) is not None:
            probe.user_clips(gradients)

    def steps(self, optimizer: Any) -> bool:
        """Measure the gradients that DeepSpeed's optimizer is about to use; return True if its step is left out."""
        probe, zero = self._probe(), self._layers.zero
        if probe is None or zero is None or zero.optimizer is not optimizer:
            return False
        probe.before_step_without_hook(optimizer)
        mine = self._owners.known(optimizer)
        return isinstance(mine, ZeroGradients) and mine.skip.discards()

    def stepped(self, optimizer: Any) -> None:
        """Restore what was changed for a step of DeepSpeed's optimizer."""
        if (probe := self._probe()) is not None:
            probe.after_step(optimizer)


_patches: dict[type, Patch] = {}  # of all monitors


def _wrap_clip(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def clip(engine: Any) -> Any:
        gradients = [one.grad for one in engine.module.parameters() if one.grad is not None]
        tell(patch.listeners, "user_clips", gradients)
        return original(engine)

    return clip


def _wrap_step(original: Function, patch: Patch) -> Function:
    @functools.wraps(original)
    def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        listeners = patch.listeners
        left_out = any(tell(listeners, "steps", optimizer))
        result = None if left_out else original(optimizer, *args, **kwargs)
        tell(listeners, "stepped", optimizer)
        return result

    return step
