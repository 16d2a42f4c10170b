"""The steps of DeepSpeed's own optimizers: a patch of their ``step``, and gradients that are not in ``grad``.

The optimizer is patched rather than the engine, since Trainers call ``engine.step()`` inside their own backward. What it holds is
known by `gradwatch.measure.deepspeed`.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any

from gradwatch.errors import UsageError, words_of
from gradwatch.measure.deepspeed import refusal
from gradwatch.measure.layers import family_of
from gradwatch.probe.backwards import parameters_behind
from gradwatch.probe.gradients import Gradients
from gradwatch.probe.patches import Patch, tell
from gradwatch.skipping import Skip

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.measure.deepspeed import Zero
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.norms import NormPlan
    from gradwatch.probe.coming import Loss
    from gradwatch.probe.optimizer_hooks import StepListener
    from gradwatch.probe.owners import Owners
    from gradwatch.probe.patches import Function
    from gradwatch.skipping.skip import Told

_LOOKS = (
    4  # steps of other optimizers after which DeepSpeed is looked for, which may have been started after the monitor
)


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
        """Remove the patches."""
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
        if not self._layers.meet_zero():
            return False
        model = self._layers.model
        reason = refusal(model) if model is not None else None
        if reason is not None:
            raise UsageError(f"this model cannot be watched: {reason}.")
        self.start()
        return True

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
        probe.before_step(optimizer, (optimizer,), {})
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


class ZeroSkip(Skip):
    """Leaves out steps of one of DeepSpeed's optimizers, as it does itself after an overflow: the engine counts them."""

    def __init__(self, zero: Zero) -> None:
        self._from = zero
        self._told: Told | None = None
        self._reason = ""

    def leave_out(self, told: Told) -> None:
        """Leave out the step that is about to be made."""
        self._told, self._reason = told, ""

    def expect(self) -> None:
        """Do nothing: a step is never left out in its middle."""

    def discards(self) -> bool:
        """Drop the gradients instead of making the step, if it is to be left out; return whether it is."""
        if self._told is not None:
            try:
                self._from.discard()
            except Exception as error:
                self._reason = f"DeepSpeed's gradients could not be dropped: {words_of(error)}"
        return self._told is not None

    def end(self, *, late: bool = False) -> None:
        """Report whether the step was left out."""
        told, self._told = self._told, None
        if told is not None:
            told("its step raised" if late else self._reason)


class ZeroGradients(Gradients):
    """The gradients of one of DeepSpeed's optimizers, as this process holds them at its step."""

    skip: ZeroSkip

    def __init__(
        self,
        zero: Zero,
        pairs: list[tuple[int, nn.Parameter]],
        layers: int,
        groups: list[int],
        total: int,
        optimizer: Optimizer,
        model: nn.Module | None,
        **settings: Any,
    ) -> None:
        super().__init__(pairs, layers, groups, total, optimizer, model, **settings)
        self._engine = zero
        self._ids = {id(one) for one in self.parameters}
        self._read = zero.reader(self.parameters)
        self.family = family_of(zero.inner)
        self.skip = ZeroSkip(zero)
        self.sharded = True
        self.hidden = zero.hides

    def is_stale(self, optimizer: Optimizer) -> bool:
        """Return whether this was made for another optimizer: DeepSpeed's keep their parameters."""
        return self.optimizer is None or self.optimizer() is not optimizer

    def present(self) -> tuple[list[Tensor], NDArray[np.intp], NormPlan | None]:
        """Return the parts of gradients that this process holds; see `Gradients.present`."""
        if self._read is None:
            return super().present()
        there = self._read()
        return self.planned(there, self.columns) if there else ([], self.columns[:0], None)

    def with_gradient(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients `present` returns."""
        return super().with_gradient() if self._read is None else self.parameters

    def columns_with_gradient(self) -> frozenset[int]:
        """Return the columns of the parameters that have a gradient."""
        return super().columns_with_gradient() if self._read is None else frozenset(self.columns.tolist())

    def clips_to(self) -> float | None:
        """Return the norm that DeepSpeed itself clips to after the measurement; None if it does not."""
        return self._engine.clips_to

    def is_behind(self, roots: Any) -> bool:
        """Return whether a backward from ``roots`` has reached the parameters, whose gradients are gone from ``grad`` by now."""
        return self._engine.runs_backward or any(id(one) in self._ids for one in parameters_behind(roots))

    def own(self, losses: list[Loss]) -> list[Loss]:
        """Return losses as their gradients count: DeepSpeed divides those of a plain ``loss.backward()`` by their number."""
        if self._engine.runs_backward or self._engine.accumulates == 1:
            return losses
        return [loss / self._engine.accumulates for loss in losses]


class Inside(Gradients):
    """No gradients: those of the torch optimizer inside DeepSpeed's, which holds parameters of DeepSpeed alone."""

    def is_stale(self, optimizer: Optimizer) -> bool:
        """Return whether this was made for another optimizer. DeepSpeed hands its groups out one at a time."""
        return self.optimizer is None or self.optimizer() is not optimizer
