"""The functions that call a model: their names at that moment, with which a loss can be computed again when they have ended.

Trainers of frameworks call `backward` in their own loop, after the user's function has returned the loss.
"""

from __future__ import annotations

import builtins
import inspect
import weakref
from collections import ChainMap
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gradwatch.forensics.frames import line_of, locals_of
from gradwatch.forensics.source import Scope

if TYPE_CHECKING:
    from types import CodeType, FrameType

_MOST = 4  # functions
_LARGEST = 16 * 2**20  # bytes of a tensor; a larger one is kept only as long as the program keeps it
_ASKS = frozenset(
    ("locals", "vars", "dir", "eval", "exec")
)  # a function that uses them may see that its names were read

_COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")


class Caller(NamedTuple):
    """A function of the program, in the middle of a call.

    Attributes:
        code, line: the function, and the line of the call.
        names: its names at that moment; of a large tensor a weak reference.
        outside: the names of its module.
    """

    code: CodeType
    line: int
    names: dict[str, Any]
    outside: dict[str, Any]

    def scope(self) -> Scope:
        """Return the names of the function at the moment of the call."""
        values = {name: one() if type(one) is weakref.ref else one for name, one in self.names.items()}
        there = {name: one for name, one in values.items() if one is not None or self.names[name] is None}
        names: Any = ChainMap({}, there, self.outside, vars(builtins))
        return Scope(self.code.co_filename, names)


class Lasting:
    """The functions that were still running when backward was called. Their names need not be kept.

    Attributes:
        latest: the one that was found last.
    """

    def __init__(self) -> None:
        self.latest: CodeType | None = None
        self._known: dict[int, CodeType] = {}  # by identity, because comparing code takes long

    def callers(self, frame: FrameType | None) -> tuple[Caller, ...]:
        """Return the functions of the program that are running, from ``frame`` outwards, as far as one that will last."""
        kept: list[Caller] = []
        while frame is not None and len(kept) < _MOST and id(frame.f_code) not in self._known:
            code = frame.f_code
            if not code.co_flags & inspect.CO_OPTIMIZED or not _ASKS.isdisjoint(code.co_names):
                break
            if code.co_name not in _COMPREHENSIONS:  # a part of a statement of the function around it
                kept.append(Caller(code, frame.f_lineno, _names_of(frame), frame.f_globals))
            frame = line_of(frame.f_back)[2]
        return tuple(kept)

    def ended(self, callers: tuple[Caller, ...], frame: FrameType | None) -> tuple[Caller, ...]:
        """Return those of the functions that have ended, given the frame in which backward is called; remember the others."""
        while callers and frame is not None:
            code = frame.f_code
            for number, one in enumerate(callers):
                if one.code is code:
                    self.latest = self._known[id(code)] = code
                    callers = callers[:number]
                    break
            frame = frame.f_back
        return callers


def _names_of(frame: FrameType) -> dict[str, Any]:
    return {
        name: weakref.ref(one) if type(one) is torch.Tensor and one.nbytes > _LARGEST else one
        for name, one in locals_of(frame).items()
    }
