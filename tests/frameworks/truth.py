"""The truth that the rows of a training under a trainer are compared with: a loop of one's own, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.trainings import true_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    import gradwatch


@dataclass
class Loop:
    """A plain training loop that keeps what each step's row must hold.

    Attributes:
        losses: loss of each step: the mean over its parts.
        norms: norm of each trained parameter by name, before the clip.
        left: norm after the clip over the norm before it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    max_norm: float | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    left: list[float] = field(default_factory=list)

    def step(self, parts: Sequence[Callable[[], Tensor]], of: int | None = None) -> None:
        """Make one step of the sum of the losses of its parts, divided by their number or by ``of``."""
        self.optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = part() / (of or len(parts))
            loss.backward()
            total += loss.item()
        self.losses.append(total)
        self.norms.append({name: true_norm(p.grad) for name, p in self.model.named_parameters() if p.requires_grad})
        norm = math.sqrt(sum(one**2 for one in self.norms[-1].values()))
        left = 1.0 if self.max_norm is None else min(1.0, self.max_norm / norm)
        self.left.append(left)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(left)
        self.optimizer.step()


def check(monitor: gradwatch.Monitor | None, loop: Loop, *, rtol: float = 1e-4) -> None:
    """Compare each row with the loop's step of the same number; trainings under a trainer may round otherwise."""
    assert monitor is not None
    assert not monitor.attached
    history = monitor.history
    assert history.rows == len(loop.losses)
    np.testing.assert_allclose(history.loss(), loop.losses, rtol=rtol)
    of = {name: [norms[name] for norms in loop.norms] for name in loop.norms[0]}
    assert set(of) <= set(history.layers)
    for name, expected in of.items():
        found = history.grad_norm()[:, history.layers.index(name)]
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6, err_msg=name)
    others = [index for index, name in enumerate(history.layers) if name not in of]
    assert not np.isfinite(history.grad_norm()[:, others]).any()
    totals = [math.sqrt(sum(one**2 for one in norms.values())) for norms in loop.norms]
    np.testing.assert_allclose(history.global_norm(), totals, rtol=rtol)
    np.testing.assert_allclose(history.clip_coefficient(), loop.left, rtol=rtol)
