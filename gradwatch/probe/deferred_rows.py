"""Rows of gradients on a device, from the step at which they are measured to the later one at which they are read.

`DeferredRows.take` does on the device what a step needs at once: norms, the exchange with other processes, the decision and
the clip. `DeferredRows.rows` returns the rows that have arrived, in order, with what was done to each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.autoclip.decision import NOTHING, Decision, DevicePlan
from gradwatch.clips import UnreadStep
from gradwatch.clips.base import OneFactor
from gradwatch.errors import PeerError
from gradwatch.measure.checkpoints import buffers_are_bad
from gradwatch.measure.norms import on_device
from gradwatch.measure.packed_row import (
    AFTER,
    BACKWARD_BAD,
    BUFFER_BAD,
    CLOSELY,
    COEFFICIENT,
    DECIDED,
    EVERY,
    FAILED,
    FAILED_RULES,
    FLAGS,
    GRADIENT_BAD,
    LEFT_OUT,
    LOSS,
    LOSS_BAD,
    LOSSES,
    NOW,
    PRESENT,
    SKIPPED,
    SQUARE,
    UnpackedRow,
)
from gradwatch.measure.readback import LAG, PATIENCE, ReadbackRing, Slot, Unread
from gradwatch.measure.sampling import Parts
from gradwatch.probe.gradients import zero_where
from gradwatch.probe.surge import surges
from gradwatch.records import Provenance, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.autoclip.guard import Guard
    from gradwatch.clips import Clip
    from gradwatch.distributed.group import Ranks, Word
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.sampling import Sample, Sampling
    from gradwatch.probe.gradients import Gradients
    from gradwatch.records import Clipped, Family, Floats, LossSource, Source


_PATTERNS = 64  # patterns of layers with a gradient whose indices are kept on the device


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
        self._parts = Parts(on_device(ranks.share, home), on_device(ranks.part, home)) if ranks is not None else None
        self._kept: dict[Any, Tensor] = {}
        self._after: Tensor | None = None
        self._left_out = 0
        self._usual: tuple[Floats, Tensor] | None = None
        self.home = home

    # On the device, without reading a value.

    def take(
        self,
        mine: Gradients,
        now: Unread,
        before: Unread | None,
        facts: HostFacts,
        loss: Tensor | float | None,
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
        self._write(slot, now if before is None else self._same_columns(before, now), now, loss, own_norms)
        facts.sample = self._sampling.take_unread(now, slot, self._parts, closely=closely)
        model, decides = self._layers.model, self._ranks is not None or plan is not None
        if decides and facts.sample.weight_norm is not None and model is not None:
            slot.ranks[FLAGS, self._rank].add_(BUFFER_BAD * buffers_are_bad(model, self.home))
        if overflow is not None:
            slot.singles[LEFT_OUT].copy_(device.moved(overflow, self.home).reshape(()))
        if self._ranks is not None:
            if facts.word is not None:
                self._say(slot, facts.word, self._ranks.rank)
            self._ranks.exchange(slot.flat)
        slot.singles[COEFFICIENT].fill_(1.0)
        bad = None
        if plan is not None:
            facts.clip, bad = self._act(mine, now, slot, plan, optimizer, scale, own=before is None)
        elif self._confirms:
            self._confirm()
        self._ring.send(facts)
        return bad

    @staticmethod
    def _say(slot: Slot, word: Word, rank: int) -> None:
        """Write what this process states about itself into a row of zeros."""
        slot.ranks[FLAGS, rank].add_(CLOSELY * word.closely)
        for index, number in ((EVERY, word.every), (FAILED_RULES, word.failed), (DECIDED, word.decided)):
            if number:
                slot.ranks[index, rank].fill_(number)
        if word.leaves_out:
            slot.singles[LEFT_OUT].fill_(1.0)

    def tell_failure(self) -> None:
        """Take part in one exchange only to report that gradwatch failed in this process."""
        slot = self._ring.next()
        slot.singles[FAILED].fill_(1.0)
        if self._ranks is not None:
            self._ranks.exchange(slot.flat)
            if self._confirms:
                self._confirm()
        self._ring.send(None)

    def look_for_failure(self) -> bool:
        """Return whether a row that reports a failure has arrived; all processes read it at the same step."""
        return any(UnpackedRow.of(table).failed for _, table in self._ring.arrived())

    def _same_columns(self, before: Unread, now: Unread) -> Unread:
        """Return ``before`` restricted to the columns of ``now``; ``now`` if some of these came after the clip."""
        if np.array_equal(before.columns, now.columns):
            return before
        if not np.isin(now.columns, before.columns).all():
            return now

        def indices() -> NDArray[Any]:
            where = {column: index for index, column in enumerate(before.columns.tolist())}
            return np.array([where[column] for column in now.columns.tolist()])

        return Unread(
            [], now.columns, before.norms[self._keep((before.columns.tobytes(), now.columns.tobytes()), indices)]
        )

    def _write(
        self, slot: Slot, whole: Unread, now: Unread, loss: Tensor | float | None, own_norms: list[Tensor]
    ) -> None:
        if len(whole.columns):
            index, squares = self._index(whole.columns), self._shared(whole)
            slot.rows[SQUARE].scatter_(0, index, squares)
            slot.rows[PRESENT].scatter_(0, index, 1.0)
            slot.singles[NOW].copy_((squares if now is whole else self._shared(now)).sum())
        if loss is not None:
            if isinstance(loss, torch.Tensor):
                slot.singles[LOSS].copy_(device.moved(loss, self.home))
            else:
                slot.singles[LOSS].fill_(loss)
            slot.singles[LOSSES].fill_(1.0)
        if self._ranks is not None:
            flags = GRADIENT_BAD * ~torch.isfinite(slot.rows[SQUARE].sum() + slot.singles[NOW])
            flags = flags + LOSS_BAD * ~torch.isfinite(slot.singles[LOSS])
            if own_norms:
                norms = torch.stack(
                    [device.moved(norm, self.home, device.widest_float(self.home)) for norm in own_norms]
                )
                flags = flags + BACKWARD_BAD * ~torch.isfinite(norms).all()
            slot.ranks[FLAGS, self._ranks.rank].copy_(flags)
            if self._after is not None:
                slot.singles[AFTER].copy_(self._after)
                self._after = None

    def _index(self, columns: NDArray[Any]) -> Tensor:
        return self._keep(columns.tobytes(), lambda: columns)

    def _keep(self, key: Any, make: Callable[[], NDArray[Any]]) -> Tensor:
        """Return the result of ``make`` as a tensor on the device, computed once for each ``key``."""
        if key not in self._kept:
            if len(self._kept) >= _PATTERNS:
                self._kept.clear()
            self._kept[key] = on_device(make(), self.home)
        return self._kept[key]

    def _shared(self, measured: Unread) -> Tensor:
        squares = torch.square(measured.norms)
        return squares if self._parts is None else squares * self._parts.share[self._index(measured.columns)]

    def _act(
        self,
        mine: Gradients,
        now: Unread,
        slot: Slot,
        plan: DevicePlan,
        optimizer: Optimizer | None,
        scale: Tensor | None,
        *,
        own: bool,
    ) -> tuple[Clip | None, Tensor | None]:
        """Clip or skip by values that stay on the device; return the clip in force and whether the step is left out.

        ``own`` is True if the exchanged norms are those that the optimizer sees, because the user did not clip before.
        """
        norm = torch.sqrt(slot.singles[NOW])
        skips = plan.skip or plan.skip_above < math.inf
        bad = ~(norm < math.inf) if plan.skip else norm > plan.skip_above
        if plan.skip and plan.skip_above < math.inf:
            bad = bad | (norm > plan.skip_above)
        clip, fires = plan.clip or plan.reserve, self._fires(slot, plan)
        if self._ranks is not None:  # if gradwatch failed in one process, which no longer acts, none of them acts
            together = slot.singles[FAILED] == 0
            bad, fires = bad & together, together if fires is None else fires & together
        coefficient = error = None
        if clip is not None:
            step = UnreadStep(
                self._layers.names,
                now.gradients,
                mine.with_gradient(),
                now.columns,
                self._whole_norms(now, slot, own=own),
                norm,
                1.0 if scale is None else device.moved(scale, self.home),
                fires,
            )
            fold = isinstance(clip, OneFactor) and plan.guard is None and mine.folds(optimizer)
            whole = torch.sqrt(slot.rows[SQUARE][self._index(now.columns)])
            left, error = self._apply(
                clip, step, plan.guard, whole, slot.singles[LOSS] / slot.singles[LOSSES], fold=fold
            )
            coefficient = left if fold else None
            slot.singles[COEFFICIENT].copy_(left)
            if clip.looks_inside and self._ranks is not None:
                self._after = self._shared(mine.measure_unread(self.home, scale)).sum()
                slot.singles[COEFFICIENT].fill_(math.nan)  # known at the next exchange
        if self._confirms:
            bad, skips = bad | self._confirm(well=error is None), True
        if skips:
            slot.singles[SKIPPED].copy_(bad)
        if optimizer is not None and mine.is_fused(optimizer):
            mine.leave_to(optimizer, coefficient, bad if skips else None)
        elif skips:
            zero_where(now.gradients, bad)
        if error is not None:
            raise error
        return clip, bad if skips else None

    def _fires(self, slot: Slot, plan: DevicePlan) -> Tensor | None:
        """Return whether the clip in reserve acts; None if a clip is in force or there is no reserve."""
        if plan.clip is not None or plan.reserve is None or plan.usual is None:
            return None
        if not np.isfinite(plan.usual).any():
            return torch.zeros((), dtype=torch.bool, device=self.home)
        if self._usual is None or self._usual[0] is not plan.usual:
            self._usual = plan.usual, on_device(plan.usual, self.home)
        norms, loss = torch.sqrt(slot.rows[SQUARE]), slot.singles[LOSS] / slot.singles[LOSSES]
        return surges(norms, self._usual[1], loss, plan)

    def _apply(
        self, clip: Clip, step: UnreadStep, guard: Guard | None, whole: Tensor, loss: Tensor, *, fold: bool
    ) -> tuple[Tensor, Exception | None]:
        """Clip, or only compute the factor if the optimizer applies it (``fold``); return the factor and the clip's error.

        If the clip was written by the user and there are other processes, its error is returned. Any other error is raised.
        """
        try:
            if guard is not None:
                return guard.around(clip, step, whole, loss), None
            return clip.factor_unread(step) if fold and isinstance(clip, OneFactor) else clip.apply_unread(step), None
        except Exception as error:
            if not self._confirms:
                raise
            return torch.ones_like(step.global_norm), error

    def _confirm(self, *, well: bool = True) -> Tensor:
        """Return whether a clip written by the user raised in any process, as a bool tensor on the device."""
        assert self._ranks is not None
        failures = torch.full((1,), float(not well), dtype=device.widest_float(self.home), device=self.home)
        self._ranks.exchange(failures)
        return failures[0] > 0

    def _whole_norms(self, now: Unread, slot: Slot, *, own: bool) -> Tensor:
        """Return the norms of whole layers; with several processes, the exchanged ones, so that all of them act alike."""
        if self._ranks is None or not own:
            return now.norms
        return torch.sqrt(slot.rows[SQUARE][self._index(now.columns)])

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
            if left_out:  # scalers leave out some steps while they search for their scale
                if self._left_out < PATIENCE:
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
        )
