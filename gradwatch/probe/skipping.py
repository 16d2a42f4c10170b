"""Steps that auto-clip leaves out. They are reported as skipped only if weights, state and buffers are as before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.skipping import Buffers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import Decision
    from gradwatch.measure.layers import Layers
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.judge import Judge
    from gradwatch.records import Row, Source

NOT_FUSED = "on a device, only a fused optimizer can leave out a step"
_FAILED = "the model's buffers could not be kept"


class Skipping:
    """Leaves steps out in one run, and keeps what is needed to undo their effect on the model's buffers.

    Args:
        layers: the watched parameters.
        judge: knows whether steps may be left out, and learns whether they were.

    Attributes:
        armed: True if steps may be left out.
        backwards: number of backwards of the model so far.
        fresh: True if there was a backward since the last step; several optimizers may step after one backward.
    """

    def __init__(self, layers: Layers, judge: Judge) -> None:
        self._judge = judge
        self._buffers: Buffers | None = None
        self._lost = ""
        self.armed = judge.may_skip
        self.fresh = True
        self.backwards = self._whose = 0
        if self.armed:
            self._guarded(lambda: self._watch(layers))

    def _watch(self, layers: Layers) -> str:
        self._buffers = Buffers(layers)
        return ""

    def _guarded(self, do: Callable[[], str | None]) -> str:
        """Call ``do`` and return why steps are not left out, or an empty text.

        If it raises, buffers are no longer kept, and no later step is reported as left out.
        """
        try:
            return do() or self._lost
        except Exception as error:
            self._lose(error)
            return self._lost

    def _lose(self, error: Exception) -> None:
        self._buffers, self._lost = None, _FAILED
        self._judge.part_failed("keeping the model's buffers", error)

    def comes(self, optimizer: Optimizer, backwards: int) -> None:
        """Record that an optimizer is about to step after so many ``backwards`` of the model in all."""
        self.fresh = backwards != self.backwards
        self.backwards, self._whose = backwards, id(optimizer)

    def count_backwards(self, backwards: int) -> None:
        """Set the number of backwards of the model so far, which includes those inside a closure."""
        self.backwards = backwards

    def _begin(self) -> Buffers | None:
        fresh, self.fresh = self.fresh, True
        buffers = self._buffers
        if buffers is not None:
            buffers.begin(self._whose, self.backwards, fresh=fresh)
        return buffers

    def made(self) -> None:
        """Record that the step is made, so that the changes of buffers by its forwards stay."""
        fresh, self.fresh = self.fresh, True
        if self._buffers is not None:
            try:  # like `_guarded`, on the hot path
                self._buffers.made(self._whose, self.backwards, fresh=fresh)
            except Exception as error:
                self._lose(error)

    def over(self) -> None:
        """Record that the step of the optimizer has ended."""
        if self._buffers is not None:
            try:
                self._buffers.stepped(self.backwards)
            except Exception as error:
                self._lose(error)

    def leave_out(self, row: Row, decision: Decision, mine: Gradients, source: Source) -> None:
        """Leave out the step that is about to be made, and tell the judge as soon as it is known whether it was left out."""
        stays = self._guarded(self._give_back)

        def told(problem: str) -> None:
            self._tell(row, decision, problem or stays)

        if source == "left out by the scaler":
            told("")
        elif mine.outer is not None and mine.outer.skip is not None:
            mine.outer.skip.leave_out_inside(told)
        elif mine.skip is None:
            mine.zero()
            told("no optimizer of torch makes the update, so that its gradients were set to zero")
        elif source == "closure":
            mine.skip.leave_out_inside(told)
        else:
            mine.skip.leave_out(told)

    def _give_back(self) -> str:
        buffers = self._begin()
        return buffers.give_back() if buffers is not None else ""

    def _tell(self, row: Row, decision: Decision, problem: str) -> None:
        self.say(problem)
        self._judge.done(row, replace(decision, skip=not problem), 1.0)

    def say(self, problem: str) -> None:
        """Report once why steps are not left out."""
        if problem and problem != NOT_FUSED:
            self._judge.note(f"a step could not be left out, and is not counted as skipped: {problem}.")

    def leave_out_where(self, bad: Tensor, *, real: bool) -> str:
        """Restore the buffers on their device if ``bad``; return why the step does not count as left out, or an empty text.

        ``real`` is True if the optimizer itself can leave the step out.
        """

        def give_back() -> str:
            buffers = self._begin()
            return buffers.give_back_where(bad) if buffers is not None else ""

        stays = self._guarded(give_back)
        return stays if real else NOT_FUSED

    def expect_closure(self, mine: Gradients) -> None:
        """Prepare for a step with a closure, inside which the backward comes."""
        self.fresh = True
        self.expect(mine)

    def expect(self, mine: Gradients) -> None:
        """Prepare for a step that may have to be left out after it has begun."""
        if self.armed and mine.skip is not None:
            mine.skip.expect()

    def inner_comes(self, outer: Gradients) -> None:
        """Record that the inner optimizer of ``outer`` is about to step on its behalf."""
        if self.armed and outer.skip is not None:
            outer.skip.evaluated(first=True)

    def closure_evaluated(self, mine: Gradients, evaluations: int) -> None:
        """Record that the closure of a step was evaluated for the given number of times; only the first one makes a row."""
        if not self.armed or mine.skip is None:
            return
        mine.skip.evaluated(first=evaluations == 1)
        buffers = self._buffers
        if evaluations > 1 and buffers is not None:
            self._guarded(buffers.give_back if mine.skip.busy else buffers.keep)
