"""One forward of a model, and what is kept of it until its step is over."""

from __future__ import annotations

import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics.frames import line_of
from gradwatch.forensics.names import tensors_in
from gradwatch.forensics.ops import next_node

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch import Tensor, nn

    from gradwatch.forensics.callers import Caller, Lasting

_LARGEST = 16 * 2**20  # bytes of an output that is kept; a larger one is kept only as long as the program keeps it


class Call:
    """One forward of a model, or of a part of a model that is not called itself.

    Attributes:
        module: what was called.
        args, kwargs: arguments.
        versions: numbers of in-place changes of the tensors among the positional arguments.
        generator: state of the CPU's generator before the forward.
        autocast: whether autocast was on, and its dtype, for the device of the call.
        file, line, code: where the program called the model.
        callers: functions that had called it and have ended since, the innermost first.
        backward: whether a backward of this forward has begun.
        started: when it began, in seconds of `time.perf_counter`.
        took: seconds for which its capture has held it up.
        first, last: numbers that autograd gave next, before and after it: its nodes have those from the first to before the last.
    """

    __slots__ = (
        "_large",
        "_output",
        "args",
        "autocast",
        "backward",
        "callers",
        "code",
        "file",
        "first",
        "generator",
        "kwargs",
        "last",
        "line",
        "module",
        "started",
        "took",
        "versions",
    )

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.started = perf_counter()
        self.took = 0.0
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.versions = [one._version for one in args if type(one) is torch.Tensor and not one.is_inference()]
        self.generator = torch.default_generator.get_state()
        self.autocast = (
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
            if torch.is_autocast_enabled("cpu")
            else None
        )
        self.file, self.line = "", 0
        self.code: CodeType | None = None
        self.callers: tuple[Caller, ...] = ()
        self._output: Any = None
        self._large: Any = None
        self.backward = False
        self.first = self.last = next_node()

    def made(self, number: int) -> bool:
        """Return whether a node of autograd with this number was made by the forward."""
        return self.first <= number < self.last

    def called_from(self, depth: int, lasting: Lasting) -> None:
        """Remember which line of the program has made the call, and the functions that it stands in."""
        file, line, frame = line_of(sys._getframe(depth + 1))
        self.file, self.line, self.code = file, line, frame.f_code if frame is not None else None
        if self.code is not lasting.latest:  # as in the loop of most programs
            self.callers = lasting.callers(frame)

    def leave(self, frame: FrameType | None, lasting: Lasting) -> None:
        """Forget those functions that have not ended, given the frame in which backward is called."""
        self.callers = lasting.ended(self.callers, frame)

    def gave(self, output: Any) -> None:
        """Remember the output; a large tensor only weakly."""
        self.last = next_node()
        if type(output) is torch.Tensor:
            if output.element_size() * output.numel() > _LARGEST:
                self._large = weakref.ref(output)
            else:
                self._output = output
        elif sum(one.element_size() * one.numel() for _, one in outputs_in(output)) <= _LARGEST:
            self._output = output

    @property
    def output(self) -> Any:
        """What the model returned; None if that is gone."""
        return self._large() if self._large is not None else self._output

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that the model returned, as far as they are still there."""
        output = self.output
        return [output] if type(output) is torch.Tensor else [one for _, one in outputs_in(output)]

    def held_up(self, seconds: float) -> None:
        """Add what its capture has taken."""
        self.took += seconds

    def begin_backward(self) -> None:
        """Record that a backward of this forward begins."""
        self.backward = True

    def without_output(self) -> Call:
        """Drop the output, which keeps the graph alive, and return the call."""
        self._output = self._large = None
        self.callers = ()
        return self

    @property
    def changed(self) -> bool:
        """Whether an input was changed in place since the forward."""
        now = [one._version for one in self.args if type(one) is torch.Tensor and not one.is_inference()]
        return now != self.versions


def outputs_in(output: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors in the output of a model: in lists, tuples, dicts and dataclasses."""
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, dict):
        output = {name: getattr(output, name, None) for name in output.__dataclass_fields__}
    return list(tensors_in(output))
