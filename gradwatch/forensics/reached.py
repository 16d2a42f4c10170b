"""Ending a repetition as soon as enough is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _python_dispatch as dispatch

from gradwatch.forensics import ops
from gradwatch.forensics.operands import is_nonfinite, rows_of
from gradwatch.measure.wrappers import local_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.forensics.marks import Mark
    from gradwatch.forensics.trace import Trace


class ReachedError(Exception):
    """Raised when the operation that was asked for has run."""


class RowsAt(dispatch.TorchDispatchMode):
    """Ends a repetition at one operation, counted as `Trace` counts them.

    Args:
        order: index of the operation.

    Attributes:
        rows: rows at which its output is not finite.
    """

    def __init__(self, order: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: tuple[int, ...] = ()
        self._left = order

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what the one that was asked for returns."""
        result = func(*args, **(kwargs or {}))
        if ops.is_view(func) or ops.is_of_profiler(func):
            return result
        if not self._left:
            outputs = [
                one for one in (*ops.tensors(result), *ops.changed_by(func, args, kwargs or {})) if is_nonfinite(one)
            ]
            self.rows = rows_of(local_of(outputs[0].detach())) if outputs else ()
            raise ReachedError
        self._left -= 1
        return result


class FirstGradient:
    """Ends a backward at the first gradient of a weight that one operation has made non-finite: it counts, whatever else does.

    Args:
        trace: what watches the operations of the backward.
        weights: the weights.

    Attributes:
        marks: the marks of that gradient; empty if there was none.
    """

    def __init__(self, trace: Trace, weights: Iterable[torch.Tensor]) -> None:
        self.marks: tuple[Mark, ...] = ()
        self._trace = trace
        for one in weights:
            if one.requires_grad:
                one.register_hook(self._arrived)

    def _arrived(self, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided:
            return
        marks = self._trace.marked.of(local_of(gradient))
        one_made_it = len({mark.key for mark in marks}) == 1 and marks[0].subject == "operation" and not marks[0].mute
        with dispatch._disable_current_modes():  # or it would be counted as an operation of the backward
            ends = one_made_it and self._trace.failed is None and is_nonfinite(gradient)
        if ends:
            self.marks = marks
            raise ReachedError
