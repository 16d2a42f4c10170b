"""What the tests of clips share: steps of gradients, histories of norms, and each clip as it is in one moment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

import gradwatch
from gradwatch.clips import CLIPS, Clip, Step, UnreadStep
from gradwatch.history.history import History
from gradwatch.history.statistics import ignore_fp_warnings
from gradwatch.measure.norms import count_nonfinite
from gradwatch.records import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

SHAPES = ((4, 5), (7,), (2, 3, 4))
LAYERS = ("lstm.weight", "lstm.bias", "head.weight")


def gradients(seed: int, scale: float = 3.0) -> list[Tensor]:
    """Return gradients of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def weights(seed: int = 7) -> list[Tensor]:
    """Return weights of the same shapes, one unit of them at zero."""
    tensors = gradients(seed, 0.3)
    tensors[0][1] = 0
    return tensors


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """Return their norms, by a second look that no overflow of float32 spoils; not finite where an element is not."""
    return [count_nonfinite(tensor)[2] for tensor in tensors]


def norm(tensors: Iterable[Tensor]) -> float:
    """Return their global norm."""
    return float(np.linalg.norm(norms(tensors)))


def step(tensors: Sequence[Tensor], parameters: Sequence[Tensor] | None = None, scale: float = 1.0) -> Step:
    """Return a step of these gradients as gradwatch would make it."""
    found = np.array(norms(tensors)) / scale
    return Step(
        LAYERS,
        list(tensors),
        parameters or weights(),
        np.arange(len(tensors)),
        found,
        float(np.linalg.norm(found)),
        scale,
    )


def unread(tensors: Sequence[Tensor], scale: float = 1.0, fires: bool | None = None) -> UnreadStep:
    """Return the same as it is on a device."""
    here = step(tensors, scale=scale)
    told = None if fires is None else torch.tensor(fires)
    whole = torch.tensor(here.global_norm, dtype=torch.float64)
    return UnreadStep(
        LAYERS, here.gradients, here.parameters, here.columns, torch.from_numpy(here.norms), whole, scale, told
    )


def lived(rows: Iterable[Sequence[float]], clip: Clip | None = None) -> tuple[History, list[Clip | None]]:
    """Push rows of layer norms as an auto-clip that is always on would see them; return the clip of each moment too."""
    history, found = History(LAYERS), []
    baseline = clip.baseline() if clip is not None else None
    for number, row in enumerate(rows):
        layer = np.array(row, dtype=float)
        total = float(np.linalg.norm(layer))
        history.push(Row(number, 1.0, layer, total))
        now = baseline.clip(history, history.rows - 1) if baseline is not None else None
        if now is not None and math.isfinite(total):
            ones = [torch.full((1,), value, dtype=torch.float64) for value in row]
            history.amend(coefficient=now.apply(step(ones, parameters=[torch.ones(1)] * 3)))
        with ignore_fp_warnings():
            history.learn()
        found.append(now)
    return history, found


def _of_a_run(clip: Clip) -> Clip:
    """Return the clip that a calm run of norms near 1 comes to."""
    generator = np.random.default_rng(0)
    now = lived(np.exp(0.1 * generator.normal(size=(150, 3))), clip)[1][-1]
    assert now is not None
    return now


def moment(name: str) -> Clip:
    """Return the clip of this name with bounds that a test can use."""
    own: dict[str, Callable[[], Clip]] = {"scale": lambda: gradwatch.ScaleToNorm(1.0)}
    clip = own[name]() if name in own else CLIPS[name]()
    return clip if clip.baseline() is None else _of_a_run(clip)
