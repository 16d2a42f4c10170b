"""Functions called before and after one optimizer step, even if it raises, for which torch has no hook."""

from __future__ import annotations

import sys
import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CellType

# torch's wrapper around the step of every optimizer class: it calls the hooks, and ``func`` between them
_STEP: Any = Optimizer.profile_hook_step(lambda _: None).__code__

_FUNC: int = _STEP.co_freevars.index("func") if "func" in _STEP.co_freevars else -1


class Around:
    """Two functions that are called before and after one call of an optimizer's step; created by `around`.

    Attributes:
        under_way: True during that call.
        begin_error, end_error: exception that a function raised, which does not reach the training; None: it raised none.
    """

    def __init__(self, cell: CellType, optimizer: Optimizer, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self._cell, self._step = cell, cell.cell_contents
        self._optimizer, self._thread = weakref.ref(optimizer), get_ident()
        # otherwise Dynamo would trace them too in a compiled step
        disable: Any = torch.compiler.disable
        self._do: tuple[Callable[[], Any], Callable[[], Any]] | None = (disable(begin), disable(end))
        self.under_way = False
        self.begin_error: Exception | None = None
        self.end_error: Exception | None = None
        cell.cell_contents = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, with the functions around it if it is the call that they are meant for."""
        step, do = self._step, self._do
        if do is None or not args or args[0] is not self._optimizer() or get_ident() != self._thread:
            return step(*args, **kwargs)
        self.under_way = True
        try:
            self.begin_error = _error_of(self.remove) or _error_of(do[0])
            return step(*args, **kwargs)
        finally:
            self._do, self.under_way = None, False
            self.end_error = _error_of(do[1])

    def remove(self) -> None:
        """Do nothing from now on, and restore torch's function unless something else has replaced it since."""
        self._do = None
        while isinstance(top := self._cell.cell_contents, Around) and top._do is None:
            self._cell.cell_contents = top._step


def _error_of(do: Callable[[], Any]) -> Exception | None:
    """Call ``do`` and return the exception that it raised, or None."""
    try:
        do()
    except Exception as error:
        return error
    return None


def around(optimizer: Optimizer, begin: Callable[[], Any], end: Callable[[], Any]) -> Around | None:
    """Have ``begin`` and ``end`` called before and after the step that is about to be made, ``end`` even if it raises.

    Call this from a hook before the step. Torch's hook after a step is not called if the step raises, and the user's hooks,
    which should see their own gradients and parameters, run between the two hooks. Therefore the function that torch's
    wrapper of the step calls is replaced for one call. Returns None if that function is not found, as in a compiled step.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    if frame is None or frame.f_locals.get("self") is not optimizer or _FUNC < 0:
        return None
    running = frame.f_locals.get("func")
    for kind in type(optimizer).__mro__:
        step = vars(kind).get("step")
        while step is not None:
            if getattr(step, "__code__", None) is _STEP:
                cell = step.__closure__[_FUNC]
                if cell.cell_contents is running:
                    return Around(cell, optimizer, begin, end)
            step = getattr(step, "__wrapped__", None)
    return None
