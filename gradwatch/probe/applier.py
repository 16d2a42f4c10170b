"""Application of decisions: gradients are clipped, and learning rates are lowered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradwatch.clips import Clip, Step

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import Decision
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.peers import Peers
    from gradwatch.records import Row, Source


class Applier:
    """Applies the decisions of one run.

    Args:
        layers: the watched parameters.
        judge: reports what cannot be done.
        peers: the other processes. If they hold parts of layers, some clips cannot act.
    """

    def __init__(self, layers: Layers, judge: Judge, peers: Peers) -> None:
        self._layers = layers
        self._judge = judge
        self._peers = peers

    def apply(
        self,
        decision: Decision,
        row: Row,
        now: Measured,
        scale: float,
        mine: Gradients,
        source: Source,
        optimizer: Optimizer | None,
    ) -> float:
        """Apply a decision on ``row`` to the gradients; return the global norm after over the norm before."""
        self.slow(mine, optimizer, decision.rate)
        clip = decision.clip
        if clip is None or not math.isfinite(now.global_norm) or not clippable(source, optimizer):
            return 1.0
        obstacle = self.obstacle(clip, mine)
        if obstacle:
            self._judge.note(obstacle)
            return 1.0
        step = Step(
            self._layers.names,
            now.gradients,
            mine.with_gradient(),
            now.columns,
            now.norms[now.columns],
            now.global_norm,
            scale,
        )
        if decision.guard is None:
            return clip.apply(step)
        return float(decision.guard.around(clip, step, torch.from_numpy(row.grad_norm[now.columns]), row.loss))

    def slow(self, mine: Gradients, optimizer: Optimizer | None, rate: float) -> None:
        """Multiply the learning rates by ``rate`` for the coming step, or report that they are not known."""
        if rate == 1.0:
            return
        if optimizer is not None:
            mine.steering.slow(optimizer, rate)
            return
        self._judge.note(
            "the learning rate is not lowered: without a torch optimizer that makes the update it is not known."
        )

    def obstacle(self, clip: Clip, mine: Gradients) -> str:
        """Return why a clip cannot act here, because it needs more than each process knows of its parts of layers; else ""."""
        if not (mine.sharded or (self._peers.ranks is not None and self._peers.ranks.sharded)):
            return ""
        if clip.needs_whole_layers:
            return f"{clip} needs whole layers, and here each process holds parts of them: it does not act."
        if clip.by_layer and mine.coming.clips:
            return (
                f"{clip} does not act after a clip of your own if layers are sharded: what your clip left of each whole "
                "layer is not known."
            )
        return ""


def clippable(source: Source, optimizer: Optimizer | None) -> bool:
    """Return whether gradients may be clipped: not inside the line search of LBFGS, which a clip would mislead."""
    return source != "closure" or not isinstance(optimizer, torch.optim.LBFGS)
