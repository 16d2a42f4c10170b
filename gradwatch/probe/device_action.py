"""What is done to a step on a device at once, by values that stay there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradwatch import device
from gradwatch.clips import UnreadStep
from gradwatch.clips.base import OneFactor
from gradwatch.measure.norms import on_device
from gradwatch.measure.packed_row import COEFFICIENT, FAILED, LOSS, LOSSES, NOW, SKIPPED, SQUARE, WEIGHT
from gradwatch.probe.gradients import zero_where
from gradwatch.probe.steering import is_fused
from gradwatch.probe.surge import SquaredLimits, overshoots, surges

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import DevicePlan
    from gradwatch.autoclip.guard import Guard
    from gradwatch.clips import Clip
    from gradwatch.distributed.group import Ranks
    from gradwatch.measure.layers import Layers
    from gradwatch.measure.readback import Slot, Unread
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.row_writer import RowWriter
    from gradwatch.records import Floats


class DeviceAction:
    """Clips and skips steps of one monitor.

    Args:
        layers: the watched parameters.
        writer: writes the rows, and knows the share of this process in each layer.
        home: the device on which rows are made.
        ranks: the processes that train together; None: this one alone.
        confirms: whether the processes exchange whether the clip raised, because it was written by the user.
    """

    def __init__(
        self, layers: Layers, writer: RowWriter, home: torch.device, ranks: Ranks | None, *, confirms: bool
    ) -> None:
        self._layers, self._writer, self._home = layers, writer, home
        self._ranks, self._confirms = ranks, confirms
        self._limits = SquaredLimits(home)

    def take_weights(self, slot: Slot) -> None:
        """Take the norms of the weights that were sampled with a row, by which the updates of the next steps are measured."""
        self._limits.take_weights(slot.rows[WEIGHT])

    def act(
        self,
        mine: Gradients,
        now: Unread,
        slot: Slot,
        plan: DevicePlan,
        optimizer: Optimizer | None,
        scale: Tensor | None,
        rates: Floats | None,
        *,
        own: bool,
    ) -> tuple[Clip | None, Tensor | None]:
        """Clip or skip by values that stay on the device; return the clip in force and whether the step is left out.

        ``rates`` are the learning rates of the layers if this is a step of SGD, shape (L,).
        ``own`` is True if the exchanged norms are those that the optimizer sees, because the user did not clip before.
        """
        norm = torch.sqrt(slot.singles[NOW])
        skips = plan.skip or plan.skip_above < math.inf
        bad = ~(norm < math.inf) if plan.skip else norm > plan.skip_above
        if plan.skip and plan.skip_above < math.inf:
            bad = bad | (norm > plan.skip_above)
        loss = slot.singles[LOSS] / slot.singles[LOSSES] if plan.clip is not None or plan.reserve is not None else None
        clip, fires = self._clip_of(now, slot, plan, loss, rates, own=own)
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
                1.0 if scale is None else device.moved(scale, self._home),
                fires,
            )
            fold = isinstance(clip, OneFactor) and plan.guard is None and mine.folds(optimizer)
            left, error = self._apply(clip, step, plan.guard, slot, loss, fold=fold)
            coefficient = left if fold else None
            slot.singles[COEFFICIENT].copy_(left)
            if clip.looks_inside and self._ranks is not None:
                self._writer.write_next(self._writer.shared(mine.measure_unread(self._home, scale)).sum())
                slot.singles[COEFFICIENT].fill_(math.nan)  # known at the next exchange
        if self._confirms:
            bad, skips = bad | self.confirm(well=error is None), True
        if skips:
            slot.singles[SKIPPED].copy_(bad)
        if optimizer is not None and is_fused(optimizer):
            mine.steering.leave_to(optimizer, coefficient, bad if skips else None)
        elif skips:
            zero_where(now.gradients, bad)
        if error is not None:
            raise error
        return clip, bad if skips else None

    def _clip_of(
        self, now: Unread, slot: Slot, plan: DevicePlan, loss: Tensor | None, rates: Floats | None, *, own: bool
    ) -> tuple[Clip | None, Tensor | None]:
        """Return the clip of this step, and whether it acts: None if it does in any case, because auto-clip is on.

        While neither the usual norms nor the rates are known, no step is known to be too large, and nothing is in reserve.
        """
        if plan.clip is not None or plan.reserve is None or loss is None:
            return plan.clip, None
        fires: list[Tensor] = []
        limits = self._limits.of(plan, rates)
        squares = seen = each = slot.rows[SQUARE]
        if not own and rates is not None and plan.early:
            seen = squares * (slot.singles[NOW] / squares.sum())
            each = torch.stack((squares, squares, seen))
        elif (
            not own and limits is not None
        ):  # what the user's clip leaves of a later step would take kernels to compute
            limits = limits[:2]
        if limits is not None:
            # a single layer does not amplify gradients
            early = plan.early and sum(self._layers.matrices[column] for column in now.columns.tolist()) > 1
            fires.append(surges(each, limits, loss, plan, early=early))
        if rates is not None and plan.overshoot < math.inf:
            fires.append(overshoots(seen, on_device(np.nan_to_num(rates), self._home), loss, plan))
        if not fires:
            return None, None
        return plan.reserve, fires[0] if len(fires) == 1 else fires[0] | fires[1]

    def _apply(
        self, clip: Clip, step: UnreadStep, guard: Guard | None, slot: Slot, loss: Tensor | None, *, fold: bool
    ) -> tuple[Tensor, Exception | None]:
        """Clip, or only compute the factor if the optimizer applies it (``fold``); return the factor and the clip's error.

        If the clip was written by the user and there are other processes, its error is returned. Any other error is raised.
        """
        try:
            if guard is not None and loss is not None:
                whole = torch.sqrt(slot.rows[SQUARE][self._writer.index(step.columns)])
                return guard.around(clip, step, whole, loss), None
            return clip.factor_unread(step) if fold and isinstance(clip, OneFactor) else clip.apply_unread(step), None
        except Exception as error:
            if not self._confirms:
                raise
            return torch.ones_like(step.global_norm), error

    def confirm(self, *, well: bool = True) -> Tensor:
        """Return whether a clip written by the user raised in any process, as a bool tensor on the device."""
        assert self._ranks is not None
        failures = torch.full((1,), float(not well), dtype=device.widest_float(self._home), device=self._home)
        self._ranks.exchange(failures)
        return failures[0] > 0

    def _whole_norms(self, now: Unread, slot: Slot, *, own: bool) -> Tensor:
        """Return the norms of whole layers; with several processes, the exchanged ones, so that all of them act alike."""
        if self._ranks is None or not own:
            return now.norms
        return torch.sqrt(slot.rows[SQUARE][self._writer.index(now.columns)])
