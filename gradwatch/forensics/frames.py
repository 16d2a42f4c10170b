"""Which line of the user's program and which module is running, read from the Python frames."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from gradwatch.forensics.names import Names

_OWN = str(Path(__file__).parent.parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_STDLIB = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_ENGINE = os.path.join(_TORCH, "autograd", "graph.py")  # noqa: PTH118  as in a code object
_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")  # noqa: PTH118
# the methods of a module that call `forward`
CALLS: frozenset[CodeType] = frozenset(
    method.__code__ for name in ("_call_impl", "_wrapped_call_impl") if (method := getattr(nn.Module, name, None))
)


class Place(NamedTuple):
    """Where an operation runs.

    Attributes:
        file, line: innermost line of the user's program; empty and 0 if there is none.
        module: path of the innermost module of the model; None if there is none.
        inside_backward: whether autograd runs it: itself, or Python code that it has called.
        own_backward: whether it belongs to the backward of a function that was written in Python.
        recomputed: whether a checkpoint computes it again in a backward, where modules around it are not known.
        in_optimizer: whether it belongs to the step of an optimizer, and not to a closure that the step evaluates.
        calls_model: whether the line is the one that called the model, because there is none further inside.
    """

    file: str = ""
    line: int = 0
    module: str | None = None
    inside_backward: bool = False
    own_backward: bool = False
    calls_model: bool = False
    in_optimizer: bool = False
    recomputed: bool = False


@cache
def is_users(file: str) -> bool:
    """Return whether a file is part of the user's program or of a library other than torch, gradwatch and Python itself."""
    if file.startswith((_OWN, _TORCH, "<frozen", "<attrs", "<eval_with_key", "<__array")):
        return False
    inside = next((file.removeprefix(one) for one in _STDLIB if file.startswith(one)), None)
    return inside is None or inside.startswith(("site-packages", "dist-packages"))


def line_of(frame: FrameType | None) -> tuple[str, int, FrameType | None]:
    """Return the file, the line and the frame of the innermost line of the user's program from ``frame`` on."""
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno, frame
        frame = frame.f_back
    return "", 0, None


def locals_of(frame: FrameType) -> dict[str, Any]:
    """Return the local variables of a frame that is running, without leaving references to them in the frame.

    Before Python 3.13 a frame keeps the dict that it has made, and with it what the function deletes or assigns anew. That of a
    module or a class is its namespace itself, and under a debugger a function gets back what is in it.
    """
    found = frame.f_locals
    names = dict(found)
    if type(found) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.gettrace() is None:
        found.clear()
    return names


def place_of(names: Names, depth: int, until: CodeType | None = None) -> Place:
    """Return where the code that has called this function runs.

    Args:
        names: names of the modules.
        depth: number of callers to leave out.
        until: function at which the program of the user ends, because it repeats a part of it.
    """
    frame: Any = sys._getframe(depth + 1)
    file, line, module, inside, recomputed = "", 0, None, False, False
    running: list[nn.Module] = []
    outer, optimizes = 0, False
    while frame is not None and frame.f_code is not until:
        code = frame.f_code
        if code in CALLS:
            running.append(frame.f_locals["self"])
        elif code.co_filename == _ENGINE and code.co_name == "_engine_run_backward":
            inside = True
            break
        elif code.co_filename == _CHECKPOINT:
            recomputed = True
        elif not line and not running and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            optimizes = True
        elif not line and is_users(code.co_filename):
            file, line, outer = code.co_filename, frame.f_lineno, len(running)
        frame = frame.f_back
    root = running[-1] if running else None
    for one in running:
        module = names.path(one, root)
        if module is not None:
            break
    own = inside and bool(line) and not recomputed
    calls = bool(line) and module is not None and outer == len(running)
    return Place(file, line, module, inside and not recomputed, own, calls, optimizes, inside and recomputed)
