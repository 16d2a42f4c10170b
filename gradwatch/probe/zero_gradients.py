"""The gradients of DeepSpeed's own optimizers, which are not in ``grad``, and the steps that are left out under DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.errors import words_of
from gradwatch.measure.layers import family_of
from gradwatch.measure.norms import NormPlan
from gradwatch.probe.backwards import parameters_behind
from gradwatch.probe.gradients import Gradients
from gradwatch.skipping import Skip

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.measure.deepspeed import Zero
    from gradwatch.probe.coming import Loss


class ZeroSkip(Skip):
    """Leaves out steps of one of DeepSpeed's optimizers, as it does itself after an overflow: the engine counts them."""

    def __init__(self, zero: Zero) -> None:
        self._from = zero
        self._told: Callable[[str], None] | None = None
        self._reason = ""

    def leave_out(self, told: Callable[[str], None]) -> None:
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
        if not there:
            return [], self.columns[:0], None
        if self._plan is None or there[0].device != self._plan.device:
            self._plan = NormPlan(there)
        return there, self.columns, self._plan

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


class EngineSkip(Skip):
    """Leaves out steps of a torch optimizer that a DeepSpeed engine steps, which counts those after which it has overflowed."""

    _marked = False

    def end(self, *, late: bool = False) -> None:
        """Restore everything after the step, as `Skip` does, and let the engine count it; before the next one, take that back."""
        leaving = self.busy
        super().end(late=late)
        if late:
            self.unmark()
        elif leaving and not self.busy and not self._reason:
            optimizer: Any = self._optimizer()
            optimizer.overflow = self._marked = True

    def unmark(self) -> None:
        """Take back that a step was left out, which the engine has read by now."""
        optimizer: Any = self._optimizer()
        if self._marked and optimizer is not None:
            del optimizer.overflow
        self._marked = False


class EngineGradients(Gradients):
    """The gradients of a torch optimizer that a DeepSpeed engine steps: stage 0 with float32."""

    skips = EngineSkip
