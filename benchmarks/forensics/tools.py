"""The tools: each runs a program and says what it has found."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from benchmarks.forensics.programs import Program


@dataclass(frozen=True)
class Said:
    """What a tool said; None for what it did not.

    Attributes:
        found: whether it said anything.
    """

    found: bool = False
    op: str | None = None
    module: str | None = None
    file: str | None = None
    line: int | None = None
    direction: str | None = None
    rows: tuple[int, ...] | None = None
    milliseconds: float | None = None


def of_origin(origin: gradwatch.Origin | None) -> Said:
    """Return what an origin says."""
    if origin is None:
        return Said()
    module = origin.module if origin.part == "model" else None
    rows = origin.rows or None
    return Said(
        *(True, origin.op, module, origin.file or None, origin.line or None, origin.direction, rows),
        1e3 * origin.seconds,
    )


def gradwatch_says(program: Program, *, forensics: Any = True) -> Said:
    """Run a program under a monitor."""
    monitors: list[gradwatch.Monitor] = []

    def attach(model: nn.Module) -> None:
        monitors.append(gradwatch.attach(model, report=None, forensics=forensics))

    try:
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # of a step after the one that failed
            program.run(attach)
        return of_origin(next((one.origin for one in monitors[0].incidents if one.origin is not None), None))
    finally:
        for monitor in monitors:
            monitor.detach()


def with_lines(program: Program) -> Said:
    """Run a program under a monitor that may run statements again."""
    return gradwatch_says(program, forensics="lines")


def find_says(program: Program) -> Said:
    """Run a program inside `gradwatch.find_nonfinite`."""
    try:
        with contextlib.ExitStack() as stack:
            program.run(lambda model: stack.enter_context(gradwatch.find_nonfinite(model)))
    except gradwatch.NonFiniteError as error:
        return of_origin(error.origin)
    return Said()


def anomaly_says(program: Program) -> Said:
    """Run a program under `torch.autograd.detect_anomaly`."""
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            program.run(lambda _: None)
        except RuntimeError as error:
            function = re.search(r"Function '(\w+?)Backward\d*' returned nan", str(error))
            if function is None:
                return Said()
            lines = re.findall(r'File "([^"]+)", line (\d+)', "".join(str(one.message) for one in told))
            own = [(file, int(line)) for file, line in lines if "/torch/" not in file]
            snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", function[1]).lower()
            file, line = own[-1] if own else (None, None)
            return Said(found=True, op=snake, file=file, line=line, direction="backward")
    return Said()


def debugger_says(program: Program) -> Said:
    """Run a program under the `DebugUnderflowOverflow` of transformers."""
    from transformers.debug_utils import DebugUnderflowOverflow

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            program.run(DebugUnderflowOverflow)
        except ValueError as error:
            if "inf/nan detected" not in str(error):
                raise
            frames = re.findall(r"^ {12,}(\S+) (\w+)$", out.getvalue(), re.MULTILINE)
            module = frames[-1][0] if frames else None
            return Said(found=True, module=module, direction="forward" if module else None)
    return Said()


TOOLS: dict[str, Callable[[Program], Said]] = {
    "gradwatch": gradwatch_says,
    'gradwatch, "lines"': with_lines,
    "find_nonfinite": find_says,
    "detect_anomaly": anomaly_says,
    "DebugUnderflowOverflow": debugger_says,
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress warnings of the programs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def said(program: Program, tool: str) -> dict[str, Any]:
    """Run a program under a tool; return what it said as plain values."""
    with quietly():
        try:
            return asdict(TOOLS[tool](program))
        except Exception:
            if "gradwatch" in tool or tool == "find_nonfinite":
                raise
            return asdict(Said())  # a tool of others that breaks the program says nothing
