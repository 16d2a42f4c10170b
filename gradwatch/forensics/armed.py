"""Watching each operation of the steps after one whose origin was not found, in case it fails again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch.utils import _python_dispatch as dispatch

from gradwatch import device
from gradwatch.forensics.capture import is_compiled
from gradwatch.forensics.explain import origin_of, sole
from gradwatch.forensics.names import Names
from gradwatch.forensics.operands import is_nonfinite
from gradwatch.forensics.replay import batch_of
from gradwatch.forensics.standins import eagerly
from gradwatch.forensics.trace import Trace, marks_in
from gradwatch.measure.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from gradwatch.records import Origin

_STEPS = 4  # that are watched after one whose origin was not found
_FORWARDS = 16  # without a backward, after which a step is watched no longer


class ArmedSteps:
    """The steps that are watched, from the first forward of each to the end of its backward.

    Attributes:
        steps: number of steps that are still to be watched.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._trace: Trace | None = None
        self._stack = ExitStack()
        self._forwards = 0

    def arm(self, model: nn.Module) -> bool:
        """Watch the next steps, and return whether they will be.

        They are not if the model is compiled, since watched operations run one by one, which rounds otherwise; nor if it is on a
        device, for which each operation would wait.
        """
        if not is_compiled(model) and all(device.reading_is_free(one.device) for one in model.parameters()):
            self.steps = _STEPS
        return bool(self.steps)

    @property
    def on(self) -> bool:
        """Whether an operation is watched now."""
        return self._trace is not None

    def forward_begins(self, model: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin to watch, if a step is to be watched and nobody else watches operations.

        Args:
            model: the model.
            module: what is called: the model, or a part of it.
            args: its arguments.
            kwargs: its arguments by name.
        """
        if not self.steps:
            return
        self._forwards += 1
        if self._forwards > _FORWARDS:
            self.disarm()
        elif self._trace is not None:
            self._trace.names.add_inputs(unwrapped(module), args, kwargs)
        elif not dispatch._get_current_dispatch_mode_stack():
            names = Names(model)
            names.add_inputs(unwrapped(module), args, kwargs)
            self._trace = Trace(names, batch=batch_of(args, kwargs))
            self._stack.enter_context(eagerly())
            self._trace.__enter__()  # type: ignore[no-untyped-call]

    def origin_in(self, tensors: Iterable[Tensor]) -> Origin | None:
        """Return the origin of those tensors that are not finite, and stop watching if there is one; None if it is not known."""
        trace = self._trace
        if trace is None or trace.failed is not None:
            return None
        with dispatch._disable_current_modes():
            bad = [one for one in tensors if is_nonfinite(one)]
            mark = sole(marks_in(trace, bad)) if bad else None
            if (
                mark is None
                or mark.mute
                or mark.subject in ("weight", "buffer")
                or (mark.subject == "argument" and mark.backward)
            ):
                return None
            return origin_of(mark, "watched step", batch=trace.batch)

    def stop(self) -> None:
        """Watch no longer until the next forward."""
        trace, self._trace, self._forwards = self._trace, None, 0
        if trace is None:
            return
        above = []  # modes of the program that were entered since, and are left later
        while dispatch._get_current_dispatch_mode() not in (None, trace):
            above.append(dispatch._pop_mode())
        if dispatch._get_current_dispatch_mode() is trace:
            trace.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for mode in reversed(above):
            dispatch._push_mode(mode)
        self._stack.close()

    def step_over(self) -> None:
        """Count a step."""
        self.stop()
        self.steps = max(0, self.steps - 1)

    def disarm(self) -> None:
        """Watch no further step."""
        self.stop()
        self.steps = 0


def are_several() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return the gradients of a model that can be read."""
    return [one.grad for one in model.parameters() if one.grad is not None and one.grad.layout is torch.strided]
