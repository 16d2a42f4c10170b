"""Rows of gradients on a device, from the step at which they are measured to the later one at which they are read.

`DeferredRows.take` does on the device what a step needs at once: norms, the exchange with other processes, the decision and
the clip. `DeferredRows.rows` returns the rows that have arrived, in order, with what was done to each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradwatch import device
from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.errors import PeerError
from gradwatch.measure.checkpoints import buffers_are_bad
from gradwatch.measure.packed_row import BUFFER_BAD, COEFFICIENT, FAILED, FLAGS, LEFT_OUT, SCALE, UnpackedRow
from gradwatch.measure.readback import LAG, PATIENCE, ReadbackRing, Unread
from gradwatch.probe.device_action import DeviceAction
from gradwatch.probe.row_writer import RowWriter
from gradwatch.records import Provenance, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.clips import Clip
    from gradwatch.distributed.group import Ranks
    from gradwatch.distributed.words import Word
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.sampling import Sample, Sampling
    from gradwatch.probe.gradients import Gradients
    from gradwatch.records import Clipped, Family, Floats, LossSource, Source


@dataclass(slots=True)
class HostFacts:
    """What the host knows of a row before its values have arrived."""

    source: Source
    clipped: Clipped
    loss_source: LossSource
    rate: Floats | None
    family: Family
    arrived: NDArray[np.bool_]
    order: NDArray[np.intp] | None = None
    optimizer: int = -1
    sample: Sample | None = None
    clip: Clip | None = None
    patience: int = PATIENCE
    problem: str = ""  # why the step does not count as left out although the optimizer cannot use its gradients
    word: Word | None = None


class DeferredRows:
    """Makes the rows of one monitor on a device, and returns them when they have arrived on the host.

    Args:
        layers: the watched parameters.
        sampling: measures weights and units on some rows.
        home: the device on which rows are made.
        ranks: the processes that train together; None: this one alone.
        confirms: whether the clip of auto-clip was written by the user, so that processes exchange whether it raised.

    Attributes:
        home: the device on which rows are made.
    """

    def __init__(
        self, layers: Layers, sampling: Sampling, home: torch.device, ranks: Ranks | None, *, confirms: bool = False
    ) -> None:
        self._layers = layers
        self._confirms = confirms and ranks is not None
        self._sampling = sampling
        self._ranks = ranks
        self._processes, self._rank = (ranks.size, ranks.rank) if ranks is not None else (1, 0)
        self._ring = ReadbackRing(len(layers), self._processes, home, LAG if ranks is not None else None)
        self._writer = RowWriter(home, ranks)
        self._action = DeviceAction(layers, self._writer, home, ranks, confirms=self._confirms)
        self._left_out = 0
        self._made = False
        self.home = home

    @property
    def under_way(self) -> int:
        """The number of rows that have not been read yet."""
        return self._ring.under_way

    # On the device, without reading a value.

    def take(
        self,
        mine: Gradients,
        now: Unread,
        before: Unread | None,
        facts: HostFacts,
        loss: Tensor | float | None,
        loss_scale: Tensor | None,
        optimizer: Optimizer | None,
        plan: DevicePlan | None,
        own_norms: list[Tensor],
        *,
        closely: bool,
    ) -> Tensor | None:
        """Exchange what was measured, decide and act on it, and start the transfer of the row.

        Args:
            mine: gradients of the step.
            now: norms as the optimizer sees them.
            before: norms before the user's clip; None if there was none.
            facts: what the host knows of the row.
            loss: loss of the step; None: no loss was seen.
            loss_scale: factor of the gradient scaler, without dimensions; None: there is no scaler.
            optimizer: optimizer that makes the step; None if there is none.
            plan: what to do with the step; None: only watch it.
            own_norms: norms of this process's own backwards.
            closely: whether the weights are sampled at each row.

        Returns:
            Whether the step is left out, as a bool tensor without dimensions; None if it cannot be.
        """
        scale = getattr(optimizer, "grad_scale", None)
        overflow = getattr(optimizer, "found_inf", None)
        slot = self._ring.next()
        self._writer.write(
            slot, now if before is None else self._writer.same_columns(before, now), now, loss, own_norms
        )
        facts.sample = self._sampling.take_unread(now, slot, self._writer.parts, facts.rate, closely=closely)
        model = self._layers.model
        if facts.sample.weight_norm is not None and model is not None:
            slot.ranks[FLAGS, self._rank].add_(BUFFER_BAD * buffers_are_bad(model, self.home, self._layers.constants))
        if loss_scale is not None:
            slot.singles[SCALE].copy_(device.moved(loss_scale, self.home).reshape(()))
        if overflow is not None:
            slot.singles[LEFT_OUT].copy_(device.moved(overflow, self.home).reshape(()))
        if self._ranks is not None:
            if facts.word is not None:
                self._writer.write_word(slot, facts.word, self._ranks.rank)
            self._ranks.exchange(slot.flat)
        if facts.sample.weight_norm is not None:
            self._action.take_weights(slot)
        bad = None
        if plan is not None:
            if facts.loss_source not in ("closure", "backward root"):
                plan = replace(plan, overshoot=math.inf)
            rates = facts.rate if facts.family == "sgd" else None
            facts.clip, bad = self._action.act(mine, now, slot, plan, optimizer, scale, rates, own=before is None)
        elif self._confirms:
            self._action.confirm()
        if facts.clip is None:
            slot.singles[COEFFICIENT].fill_(1.0)
        self._ring.send(facts)
        return bad

    def tell_failure(self) -> None:
        """Take part in one exchange only to report that gradwatch failed in this process."""
        slot = self._ring.next()
        slot.singles[FAILED].fill_(1.0)
        if self._ranks is not None:
            self._ranks.exchange(slot.flat)
            if self._confirms:
                self._action.confirm()
        self._ring.send(None)

    def look_for_failure(self) -> bool:
        """Return whether a row that reports a failure has arrived; all processes read it at the same step."""
        return any(UnpackedRow.of(table).failed for _, table in self._ring.arrived())

    # On the host, later.

    def rows(self, *, wait: bool = False) -> Iterator[tuple[Row, Decision, UnpackedRow, str]]:
        """Yield the rows that have arrived, in order and not yet numbered; with ``wait`` all rows under way.

        Each row comes with what was done to it, its values, and why a step could not be left out.

        Raises:
            PeerError: gradwatch failed in another process.
        """
        for facts, table in self._ring.arrived(wait=wait):
            numbers = UnpackedRow.of(table)
            if numbers.failed:
                raise PeerError("gradwatch failed in another process, whose output shows the cause")
            left_out = numbers.left_out >= self._processes  # if some processes make the step, it is judged
            self._left_out = self._left_out + 1 if left_out else 0
            self._made |= not left_out
            if left_out:  # scalers leave out some steps while they search for their scale
                if self._left_out < (PATIENCE if self._made else facts.patience):
                    continue
                facts.source = "left out by the scaler"
            decision = NOTHING
            skipped = numbers.skipped and not left_out
            if skipped and not facts.problem:
                decision = Decision(skip=True)
            elif facts.clip is not None and not left_out:
                decision = Decision(clip=facts.clip)
            yield self._row(facts, numbers), decision, numbers, facts.problem if skipped else ""

    def _row(self, facts: HostFacts, numbers: UnpackedRow) -> Row:
        sample = facts.sample
        assert sample is not None
        sample.fill(numbers)
        # another process may have seen a loss although this one did not
        loss_source: LossSource = facts.loss_source if facts.loss_source != "none" else "backward root"
        if numbers.loss is None:
            loss_source = "none"
        left = numbers.now_norm / numbers.global_norm if numbers.global_norm > 0 else 1.0
        return Row(
            step=-1,
            loss=numbers.loss if numbers.loss is not None else math.nan,
            grad_norm=numbers.grad_norm,
            global_norm=numbers.global_norm,
            weight_norm=sample.weight_norm,
            nonfinite=numbers.nonfinite,
            nonfinite_weight=sample.nonfinite_weight,
            counts=None,
            # inside backward the optimizer has already used the gradients
            poisoned=not math.isfinite(numbers.now_norm) and facts.source != "optimizer in backward",
            rate=facts.rate,
            family=facts.family,
            optimizer=facts.optimizer,
            applied=left if left < 1.0 and facts.clipped == "before the user's clip" else 1.0,
            dead_share=sample.dead_share,
            unchanged=sample.unchanged,
            arrived=facts.arrived,
            order=facts.order,
            culprits=self._ranks.culprits(numbers) if self._ranks is not None else None,
            provenance=Provenance(facts.source, facts.clipped, loss_source, self._processes),
            loss_scale=numbers.loss_scale,
            buffers_well=None if sample.weight_norm is None else numbers.buffers_are_well,
        )
