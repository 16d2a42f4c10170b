"""What the recorders of one monitor share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.sampling import Sampling
    from gradwatch.probe.applier import Applier
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.investigator import Investigator
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.loss_reader import LossReader
    from gradwatch.probe.peers import Peers
    from gradwatch.probe.skipping import Skipping


class RecorderParts(NamedTuple):
    """The parts by which rows are made, wherever gradients are.

    Attributes:
        layers: the watched parameters.
        judge: judges every row.
        hooks: which gradients arrived, and in which order.
        losses: what is known of the loss.
        peers: the other processes of a distributed training.
        sampling: statistics that are sampled.
        skipping: leaves steps out.
        applier: applies decisions to gradients.
        investigator: is told of rows that are not finite.
    """

    layers: Layers
    judge: Judge
    hooks: GradientHooks
    losses: LossReader
    peers: Peers
    sampling: Sampling
    skipping: Skipping
    applier: Applier
    investigator: Investigator | None = None
