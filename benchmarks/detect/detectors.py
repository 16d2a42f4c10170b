"""Untuned detectors from the literature and from other tools, on the recorded numbers of a run.

Each is a function of a `Trace`, and says at which step it raises its first alarm (None: never), looking only back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Trace
    from gradwatch.records import Floats


def _global(trace: Trace) -> Floats:
    """L2 norm of all gradients of each step, (T,); not finite where one is not."""
    norms = np.array(trace.grad_norm)
    missing = np.isnan(norms) & np.array(trace.absent)
    with np.errstate(all="ignore"):
        total: Floats = np.sqrt(np.sum(np.square(np.where(missing, 0.0, norms)), axis=1))
    return total


def _first(hits: object) -> int | None:
    found = np.flatnonzero(np.asarray(hits))
    return int(found[0]) if found.size else None


def non_finite(trace: Trace) -> int | None:
    """NaN or Inf in the loss or in a gradient."""
    return _first(~np.isfinite(trace.losses) | ~np.isfinite(_global(trace)))


def norm_above_100(trace: Trace) -> int | None:
    """The global norm above 100, or not finite."""
    return _first(~(_global(trace) <= 100) | ~np.isfinite(trace.losses))


def textbook(trace: Trace) -> int | None:
    """Not finite, or a norm above 100, or a layer's norm below 1e-7: the union that tutorials name."""
    norms = np.array(trace.grad_norm)
    with np.errstate(all="ignore"):
        vanishing = (norms < 1e-7).any(axis=1)
    return _first(vanishing | ~(_global(trace) <= 100) | ~np.isfinite(trace.losses))


def each_layer_above_one(trace: Trace) -> int | None:
    """Each layer's norm above 1.0 on five steps in a row."""
    norms = np.array(trace.grad_norm)
    above = ((norms > 1.0) | ~np.isfinite(norms)).all(axis=1)
    run = 0
    for step, hit in enumerate(above):
        run = run + 1 if hit else 0
        if run == 5:
            return step
    return None


def sagemaker(trace: Trace) -> int | None:
    """SageMaker Debugger's ExplodingTensor, VanishingGradient (below 1e-7) and LossNotDecreasing (10 steps, 0.1 %)."""
    norms = np.array(trace.grad_norm)
    for step, loss in enumerate(trace.losses):
        if not np.isfinite(loss) or (norms[step] < 1e-7).any() or np.isinf(norms[step]).any():
            return step
        if step and step % 10 == 0:
            before = trace.losses[step - 10]
            if not before - loss >= abs(before) * 0.001:
                return step
    return None


def zclip(trace: Trace) -> int | None:
    """ZClip's trigger: z above 2.5 with averages of 0.97, after 25 steps."""
    norms = _global(trace)
    first = norms[:25]
    mean, variance = float(np.mean(first)), float(np.var(first))
    for step in range(25, len(norms)):
        norm = float(norms[step])
        if not math.isfinite(norm) or (norm - mean) / (math.sqrt(variance) + 1e-6) > 2.5:
            return step
        mean = 0.97 * mean + 0.03 * norm
        variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    return None


def olmo(trace: Trace) -> int | None:
    """OLMo-core's: loss or norm six standard deviations above the mean of the last 128 steps."""
    for series in (np.array(trace.losses), _global(trace)):
        for step in range(64, len(series)):
            window = series[max(0, step - 128) : step]
            if not series[step] - window.mean() <= 6 * window.std():
                return step
    return None


def megatron(trace: Trace) -> int | None:
    """Megatron-LM's: a loss of at least ten times the largest of the first 100, or NaN."""
    losses = np.array(trace.losses)
    level = np.nanmax(losses[:100])
    return _first(~np.isfinite(losses) | ((np.arange(len(losses)) >= 100) & (losses >= 10 * level)))


def deep_checker(trace: Trace) -> int | None:
    """TheDeepChecker's: a layer's norm at least doubles from window to window, five times in a row, or exceeds 1e6."""
    norms = np.array(trace.grad_norm)
    windows = norms[: len(norms) // 5 * 5].reshape(-1, 5, norms.shape[1]).mean(axis=1)
    run = np.zeros(norms.shape[1])
    for window in range(1, len(windows)):
        with np.errstate(all="ignore"):
            run = np.where(windows[window] >= 2 * windows[window - 1], run + 1, 0)
            if (run >= 5).any() or (windows[window] > 1e6).any() or np.isinf(windows[window]).any():
                return 5 * window + 4
    return None


BASELINES: dict[str, Callable[[Trace], int | None]] = {
    "not finite": non_finite,
    "norm > 100": norm_above_100,
    "not finite, norm > 100, vanishing": textbook,
    "each layer > 1.0 for 5 steps": each_layer_above_one,
    "SageMaker Debugger's three": sagemaker,
    "ZClip's trigger": zclip,
    "OLMo-core, 6 sigma": olmo,
    "Megatron-LM, 10 times": megatron,
    "TheDeepChecker's growth": deep_checker,
}
