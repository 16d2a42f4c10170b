"""Steps that auto-clip leaves out: for real, with the model's buffers as before, or not claimed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.skipping.buffers import Buffers

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
    """What is kept for the case that a step is left out, and how it is left out, in one run.

    Attributes: ``armed`` is True where a step may be left out at all, ``backwards`` is the number of the model's so far,
    ``fresh`` is True when there has been one since the last step: several optimizers may step after one.
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
        """Do something with the buffers; where that fails no step is called left out any more, and the rest goes on."""
        try:
            return do() or self._lost
        except Exception as error:
            self._lose(error)
            return self._lost

    def _lose(self, error: Exception) -> None:
        self._buffers, self._lost = None, _FAILED
        self._judge.part_failed("keeping the model's buffers", error)

    def comes(self, optimizer: Optimizer, backwards: int) -> None:
        """A step of this optimizer comes: its forwards are those since the last step, if there was a backward."""
        self.fresh = backwards != self.backwards
        self.backwards, self._whose = backwards, id(optimizer)

    def count_backwards(self, backwards: int) -> None:
        """Take note of how many backwards of the model there have been, some of them inside a closure."""
        self.backwards = backwards

    def _begin(self) -> Buffers | None:
        fresh, self.fresh = self.fresh, True
        buffers = self._buffers
        if buffers is not None:
            buffers.begin(self._whose, self.backwards, fresh=fresh)
        return buffers

    def made(self) -> None:
        """The step is made: what its forwards did to the buffers stays."""
        fresh, self.fresh = self.fresh, True
        if self._buffers is not None:
            try:  # as `_guarded`, on the hot path
                self._buffers.made(self._whose, self.backwards, fresh=fresh)
            except Exception as error:
                self._lose(error)

    def over(self) -> None:
        """The optimizer has made its step, or what was left of it."""
        if self._buffers is not None:
            try:
                self._buffers.stepped(self.backwards)
            except Exception as error:
                self._lose(error)

    def leave_out(self, row: Row, decision: Decision, mine: Gradients, source: Source) -> None:
        """Leave out the step that is about to be made; the judge is told when it is known whether it was."""
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
        """Say once why steps are not left out."""
        if problem and problem != NOT_FUSED:
            self._judge.note(f"a step could not be left out, and is not counted as skipped: {problem}.")

    def leave_out_where(self, bad: Tensor, *, real: bool) -> str:
        """On a device, do with the buffers what is done with the step; return why that does not leave it out, or nothing."""

        def give_back() -> str:
            buffers = self._begin()
            return buffers.give_back_where(bad) if buffers is not None else ""

        stays = self._guarded(give_back)
        return stays if real else NOT_FUSED

    def expect_closure(self, mine: Gradients) -> None:
        """The optimizer is about to step with a closure, in which the backward comes."""
        self.fresh = True
        self.expect(mine)

    def expect(self, mine: Gradients) -> None:
        """The optimizer is about to step, and may have to be left out in the middle of it."""
        if self.armed and mine.skip is not None:
            mine.skip.expect()

    def inner_comes(self, outer: Gradients) -> None:
        """The optimizer that another one is around is about to step for it."""
        if self.armed and outer.skip is not None:
            outer.skip.evaluated(first=True)

    def closure_evaluated(self, mine: Gradients, evaluations: int) -> None:
        """It was evaluated, so many times in this step; after the first, the row was made already."""
        if not self.armed or mine.skip is None:
            return
        mine.skip.evaluated(first=evaluations == 1)
        buffers = self._buffers
        if evaluations > 1 and buffers is not None:
            self._guarded(buffers.give_back if mine.skip.busy else buffers.keep)
