"""A small watched training of every kind of step, and an error put into one call of one of gradwatch's functions."""

from __future__ import annotations

import inspect
import io
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch.probe import optimizer_hooks, patches
from gradwatch.reports.live import LiveReport
from gradwatch.reports.log import LogReport
from gradwatch.runlog import lock
from tests.conftest import left_behind
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from types import CodeType, FrameType

_PACKAGE = str(Path(gradwatch.__file__).parent)
STEPS = 120


class InjectedError(RuntimeError):
    """The error that is put in."""

    def __str__(self) -> str:
        raise RuntimeError("an error that cannot be put in words")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Claim it."""
        return True


class Call(NamedTuple):
    """One call of a function: the ``number``-th in this part of the training."""

    code: CodeType
    phase: str
    number: int

    def __str__(self) -> str:
        where = Path(self.code.co_filename).relative_to(_PACKAGE)
        return f"{where}:{self.code.co_firstlineno} {self.code.co_qualname} call {self.number} in {self.phase}"


class Injection:
    """Counts the calls of gradwatch's functions in all threads, and raises in one of them.

    Attributes: ``counts`` are the calls by code and phase, ``outermost`` the codes that no other of gradwatch calls,
    ``in_threads`` those that ran in other threads, as often as the clock has it; ``raised`` is True when the error was raised.
    """

    def __init__(self, call: Call | None = None) -> None:
        self._call = call
        self._ours: dict[CodeType, bool] = {}
        self.phase = "the loop"
        self.counts: Counter[tuple[CodeType, str]] = Counter()
        self.outermost: set[CodeType] = set()
        self.in_threads: set[CodeType] = set()
        self.raised = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Be a profile function."""
        if event != "call" or self.raised:
            return
        code = frame.f_code
        if self._call is None:
            self._count(code, frame)
        elif code is self._call.code and self.phase == self._call.phase:
            self.counts[code, self.phase] += 1
            if self.counts[code, self.phase] == self._call.number:
                self.raised = True
                raise InjectedError

    def _count(self, code: CodeType, frame: FrameType) -> None:
        if code not in self._ours:
            # no module, no body of a class, and no expression that is resumed when it is collected, where nobody catches
            function = bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_name != "<genexpr>"
            self._ours[code] = function and code.co_filename.startswith(_PACKAGE)
        if self._ours[code]:
            self.counts[code, self.phase] += 1
            if frame.f_back is None or not frame.f_back.f_code.co_filename.startswith(_PACKAGE):
                self.outermost.add(code)
            if threading.current_thread() is not threading.main_thread():
                self.in_threads.add(code)

    def calls(self) -> list[Call]:
        """Return the first, the middle and the last call of each function that gradwatch itself calls, by phase."""
        found = []
        for (code, phase), count in self.counts.items():
            if code not in self.outermost:
                found += [Call(code, phase, number) for number in sorted({1, (count + 1) // 2, count})]
        return sorted(found, key=lambda call: (str(call), call.number))


def train(injection: Injection, folder: Path) -> list[str]:
    """Train watched and end the monitor; return what went wrong: errors that came out, and what stays behind."""
    model, (x, y), before = mlp(seed=1), data(), Counter(left_behind())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reports = [LogReport(io.StringIO()), LiveReport(Console(file=Terminal(), force_terminal=True, width=80, height=24))]
    threads: list[str] = []
    excepthook, threading.excepthook = threading.excepthook, lambda of: threads.append(of.exc_type.__name__)
    threading.setprofile(injection)
    monitor = gradwatch.attach(model, clip="norm", report=reports, log=folder)
    wrong = []
    try:
        sys.setprofile(injection)
        try:
            for step in range(STEPS):
                _step(step, model, optimizer, x, y)
        finally:
            injection.phase = "detach"
        sys.setprofile(injection)
        monitor.detach()
    except Exception as error:
        wrong.append(f"{type(error).__name__} reached the training")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        try:
            monitor.detach()
        except Exception as error:
            wrong.append(f"{type(error).__name__} came out of detach")
        threading.excepthook = excepthook
    wrong += [f"{name} ended a thread" for name in threads] + [
        f"left behind: {one}" for one in Counter(_left(model)) - before
    ]
    return wrong


def _step(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """Make a step: some are clipped by the user, six explode, one has a loss that is not a number."""
    batch = torch.arange(32 * step, 32 * step + 32) % len(x)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x[batch]), y[batch])
    if 84 <= step < 90:
        loss = loss * 1e4
    if step == 100:
        loss = loss * float("nan")
    loss.backward()
    if 20 <= step < 50 or step >= 74:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    elif step % 8 == 0:
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()


def _left(model: nn.Module) -> list[str]:
    """Name what is left in torch and on the model, and take it away so that the next training begins clean."""
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    found = left_behind() + (["hooks on parameters"] if hooked else []) + ["the lock of a run log"] * len(lock._mine)
    for patch in patches.ALL:
        for listener in patch.listeners:
            patch.remove(listener)
    for probe in [ref() for ref in optimizer_hooks._probes]:
        if probe is not None:
            optimizer_hooks.unlisten(probe)
    lock._mine.clear()
    return found
