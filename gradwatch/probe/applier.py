"""What was decided is done to the gradients: they are clipped, and the learning rate is lowered."""

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
    from gradwatch.records import Source


class Applier:
    """Applies decisions in one run.

    Args:
        layers: the watched parameters.
        judge: told of what cannot be done.
        peers: where they hold parts of layers, some clips cannot act.
    """

    def __init__(self, layers: Layers, judge: Judge, peers: Peers) -> None:
        self._layers = layers
        self._judge = judge
        self._peers = peers

    def apply(
        self,
        decision: Decision,
        now: Measured,
        scale: float,
        mine: Gradients,
        source: Source,
        optimizer: Optimizer | None,
    ) -> float:
        """Do what was decided to the gradients; return the norm after over the norm before."""
        self.slow(mine, optimizer, decision.rate)
        clip = decision.clip
        if clip is None or not math.isfinite(now.global_norm) or not clippable(source, optimizer):
            return 1.0
        if not self.fits(clip, mine):
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
        return clip.apply(step) if decision.guard is None else decision.guard.around(clip, step)

    def slow(self, mine: Gradients, optimizer: Optimizer | None, rate: float) -> None:
        """Multiply the learning rates by ``rate`` for the step that comes."""
        if rate == 1.0:
            return
        if optimizer is not None:
            mine.slow(optimizer, rate)
            return
        self._judge.note("the learning rate is not known where no torch optimizer makes the update: it is not lowered.")

    def fits(self, clip: Clip, mine: Gradients) -> bool:
        """Return whether a clip can act here; where it asks for what no process knows of parts of layers, say so."""
        if not (mine.sharded or (self._peers.ranks is not None and self._peers.ranks.sharded)):
            return True
        if clip.needs_whole_layers:
            self._judge.note(f"{clip} needs whole layers, and here each process holds parts of them: it does not act.")
            return False
        if clip.by_layer and mine.coming.before_clip is not None:
            self._judge.note(
                f"{clip} does not act after a clip of your own where layers are sharded: what that left of each whole "
                "layer is not known."
            )
            return False
        return True


def clippable(source: Source, optimizer: Optimizer | None) -> bool:
    """Return False inside a line search: there the gradients belong to the search, and a clip would mislead it."""
    return source != "closure" or not isinstance(optimizer, torch.optim.LBFGS)
