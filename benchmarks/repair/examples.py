"""The trainings of the examples, each under several policies."""

from __future__ import annotations

import math
from collections.abc import Callable  # noqa: TC003  in the type of a table
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

import gradwatch
from benchmarks.repair.methods import NOTHING, always, always_norm, always_value
from benchmarks.repair.outcome import Outcome
from examples import digits_classifier, regression_mlp, rnn_long_sequence

Policy = gradwatch.AutoClip | str | None
_ON_SEQUENCES: dict[str, Callable[[], Policy]] = {
    "none": lambda: None,
    "always norm 1": partial(always_norm, 1.0),
    "always norm 5": partial(always_norm, 5.0),
    "auto-clip": lambda: "norm",
}
REGRESSION: dict[str, Callable[[], Policy]] = {
    NOTHING: lambda: None,
    "auto-clip norm": lambda: "norm",
    "auto-clip value": lambda: "value",
    **{f"always norm {bound:g}": partial(always_norm, bound) for bound in (0.5, 1.0, 2.0, 5.0, 10.0)},
    "always norm 1 of each tensor": lambda: always(gradwatch.ClipLayerNorm(1.0)),
    **{f"always value {bound:g}": partial(always_value, bound) for bound in (0.5, 1.0, 5.0, 10.0)},
    "always norm 1, then value 0.5": lambda: always(gradwatch.ClipNormThenValue(1.0, 0.5)),
    "always norm 5, then value 1": lambda: always(gradwatch.ClipNormThenValue(5.0, 1.0)),
    "always scaled to norm 10": lambda: always(gradwatch.ScaleToNorm(10.0)),
}
DIGITS: dict[str, tuple[float, Callable[[], Policy]]] = {
    "digits, rate 0.1, none": (digits_classifier.HEALTHY_RATE, lambda: None),
    "digits, rate 0.1, always norm 1": (digits_classifier.HEALTHY_RATE, partial(always_norm, 1.0)),
    "digits, rate 0.1, auto-clip": (digits_classifier.HEALTHY_RATE, lambda: "norm"),
    "digits, rate 3, none": (digits_classifier.WRECKING_RATE, lambda: None),
    "digits, rate 3, always norm 1": (digits_classifier.WRECKING_RATE, partial(always_norm, 1.0)),
    "digits, rate 3, auto-clip": (digits_classifier.WRECKING_RATE, lambda: "norm"),
    "digits, rate 3, auto-clip that may lower the rate": (
        digits_classifier.WRECKING_RATE,
        lambda: gradwatch.AutoClip("norm", escalate=("rate",)),
    ),
}
SEQUENCES: dict[str, tuple[str, Callable[[], Policy]]] = {
    f"{cell}, {name}": (cell, policy) for cell in ("rnn", "lstm") for name, policy in _ON_SEQUENCES.items()
}


def trained(name: str, seed: int) -> dict[str, Any]:
    """Run one of the examples' trainings; return its `Outcome` as a dict."""
    torch.set_num_threads(1)
    errors: tuple[float, ...]
    if name in REGRESSION:
        result, monitor = regression_mlp.watched(seed, REGRESSION[name]())
        errors, losses = (result.train_error, result.test_error), result.losses
    elif name in DIGITS:
        rate, policy = DIGITS[name]
        accuracy, monitor = digits_classifier.train(rate, policy(), seed)
        errors, losses = (accuracy,), [0.0]
    else:
        cell, policy = SEQUENCES[name]
        sequence = rnn_long_sequence.train(cell, policy(), steps=200, seed=seed)
        losses, monitor = sequence.losses, sequence.monitor
        errors = (float(np.mean(losses[-20:])),)
    bad = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    told = tuple(f"{i}: {i.clip}" for i in monitor.incidents if i.clip is not None)
    return asdict(Outcome(len(losses), errors[-1], bad[0] if bad else None, None, not bad, told=told, errors=errors))
