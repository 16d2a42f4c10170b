"""What is done to a training to repair it: auto-clip, other ways to clip, and doing something at random."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable  # noqa: TC003  in the type of a table
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradwatch
from benchmarks.device_path import ON_DEVICE, device_path
from benchmarks.faults.program import run_program
from benchmarks.repair.outcome import Outcome, bits_of
from gradwatch.autoclip.limits import AutoClipLimits

if TYPE_CHECKING:
    from torch import Tensor

OURS, OURS_BY_VALUE = "auto-clip", "auto-clip by value"
NORM, VALUE = "always norm 1.0", "always value 5.0"
WATCHED = "watched only"
NOTHING = "none"
RANDOM = "random repair"
OLMO = "OLMo skip"
ABLATED: dict[str, dict[str, Any]] = {
    "layer outliers": {"apart": 1e300},
    "the step bound": {"shortest": 1.0},
    "narrowing": {"narrowest": 1.0},
    "release by degrees": {"loosen": 10.0},
    "longer holds": {"longer": 1.0},
    "letting go of what does harm": {"compared": 10**6},
}


def always(clip: gradwatch.Clip) -> gradwatch.AutoClip:
    """Return the policy that applies a clip to each step and leaves NaN alone."""
    return gradwatch.AutoClip(clip, when="always", on_nonfinite="ignore")


def always_norm(bound: float) -> gradwatch.AutoClip:
    """Return the policy that clips the norm of each step."""
    return always(gradwatch.ClipNorm(bound))


def always_value(bound: float) -> gradwatch.AutoClip:
    """Return the policy that clips each element of each step."""
    return always(gradwatch.ClipValue(bound))


CLIPS: dict[str, Callable[[], gradwatch.AutoClip]] = {
    OURS: lambda: gradwatch.AutoClip("norm"),
    OURS_BY_VALUE: lambda: gradwatch.AutoClip("value"),
    NORM: lambda: always(gradwatch.ClipNorm(1.0)),
    VALUE: lambda: always(gradwatch.ClipValue(5.0)),
    "always value 1.0": lambda: always(gradwatch.ClipValue(1.0)),
    "ZClip": lambda: always(gradwatch.ClipZScore()),
    "AutoClip 90": lambda: always(gradwatch.ClipPercentile(90.0)),
    "AGC 0.01": lambda: always(gradwatch.ClipAGC()),
    "AdaGC": lambda: always(gradwatch.ClipAdaGC()),
}


def without(part: str) -> str:
    """Return the name of auto-clip without one of its parts."""
    return f"{OURS} without {part}"


CLIPS |= {
    without(part): partial(gradwatch.AutoClip, "norm", limits=AutoClipLimits(**limits))
    for part, limits in ABLATED.items()
}


class Repaired:
    """A run to which a method is applied; a watcher of the fault set."""

    def __init__(self, method: str, lot: str) -> None:
        self._method = method.removesuffix(ON_DEVICE)
        self._lot = random.Random(lot)
        self.losses: list[float] = []
        self.monitor: gradwatch.Monitor | None = None
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        self._model = model
        if self._method == WATCHED:
            self.monitor = gradwatch.attach(model, report=None, strict=True)
        elif self._method in CLIPS:
            self.monitor = gradwatch.attach(model, clip=CLIPS[self._method](), report=None, strict=True)
        elif self._method == RANDOM:
            self._repair_at_random()
        elif self._method == OLMO:
            self._skip_outliers()

    def step(self, loss: float) -> None:
        """See `benchmarks.faults.program.Watcher`."""
        self.losses.append(loss)

    def end(self) -> None:
        """Take everything away again."""
        for handle in self._handles:
            handle.remove()
        if self.monitor is not None:
            self.monitor.detach()

    def _repair_at_random(self) -> None:
        """One of the repairs that repair tools try, drawn by lot, from the first step on."""
        actions: list[Callable[[torch.optim.Optimizer], None]] = [
            lambda optimizer: _rate(optimizer, 0.1),
            lambda optimizer: _rate(optimizer, 10.0),
            lambda _: _clip(self._model, lambda p: nn.utils.clip_grad_norm_(p, 1.0)),
            lambda _: _clip(self._model, lambda p: nn.utils.clip_grad_value_(p, 0.5)),
            lambda optimizer: _decay(optimizer, 1e-3),
            lambda _: None,
        ]
        action = self._lot.choice(actions)
        rates: list[list[float]] = []

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])
            action(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if rates:
                for group, rate in zip(optimizer.param_groups, rates.pop(), strict=True):
                    group["lr"] = rate

        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def _skip_outliers(self) -> None:
        """OLMo-core's: leave out steps whose loss before or norm is six standard deviations above the last 128."""
        norms: deque[float] = deque(maxlen=128)
        hidden: list[tuple[nn.Parameter, Tensor]] = []

        def before(*_: Any) -> None:
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            past = np.array(norms)
            if len(past) >= 64 and not norm <= past.mean() + 6 * past.std():
                for parameter in self._model.parameters():
                    if parameter.grad is not None:
                        hidden.append((parameter, parameter.grad))
                        parameter.grad = None
            norms.append(norm)

        def after(*_: Any) -> None:
            while hidden:
                parameter, gradient = hidden.pop()
                parameter.grad = gradient

        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


def _rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor


def _clip(model: nn.Module, clip: Callable[[list[nn.Parameter]], Any]) -> None:
    clip([p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse])


def _decay(optimizer: torch.optim.Optimizer, decay: float) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - decay)


def repaired(method: str, train: Any, seed: int, steps: int, lot: str = "") -> dict[str, Any]:
    """Run a training with a method applied; return its `Outcome` as a dict."""
    torch.set_num_threads(1)
    run = Repaired(method, f"{lot}/{seed}")
    stopped = made = None
    with device_path(on=method.endswith(ON_DEVICE)):
        try:
            made = run_program(train, seed, steps, run)
        except gradwatch.TrainingUnstableError:
            stopped = len(run.losses)
        finally:
            run.end()
    losses = np.array(run.losses or [math.nan])
    bad = np.flatnonzero(~np.isfinite(losses))
    finite = all(bool(p.isfinite().all()) for p in run._model.parameters())
    last = losses[-max(1, len(losses) // 10) :]
    if finite and np.isfinite(last).any():  # the loss of a bad batch that did no harm
        last = last[np.isfinite(last)]
    outcome = Outcome(
        steps=len(run.losses),
        final=float(np.median(last)),
        nonfinite=int(bad[0]) if bad.size else None,
        stopped=stopped,
        finite=finite,
        bits=bits_of(losses, run._model),
    )
    held_out = None if made is None else made.held_out()
    if made is not None and made.before is not None and held_out is not None:
        outcome.final, outcome.metric, outcome.unlearned = held_out.loss, held_out.metric, made.before.loss
    if run.monitor is not None:
        clipping = run.monitor._pipeline.clipping
        outcome.touched = 0 if clipping is None else clipping.clipped + clipping.skipped
        outcome.told = tuple(f"{i}: {i.clip}" for i in run.monitor.incidents if i.clip is not None)
        outcome.alarms = tuple(str(i) for i in run.monitor.incidents if i.severity != "notice")
    return asdict(outcome)
