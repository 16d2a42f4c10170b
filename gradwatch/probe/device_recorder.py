"""Rows of gradients on a device: their transfer starts at each step, and they are returned once they have arrived."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradwatch.clips import Clip
from gradwatch.measure.readback import Unread
from gradwatch.probe.applier import clippable
from gradwatch.probe.deferred_rows import DeferredRows, HostFacts
from gradwatch.probe.patches import clip_seen
from gradwatch.probe.steering import is_fused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import Decision, DevicePlan
    from gradwatch.distributed.words import Word
    from gradwatch.measure.packed_row import UnpackedRow
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.recorder_parts import RecorderParts
    from gradwatch.records import Family, Floats, Row, Source


class DeviceRecorder:
    """Makes the rows of one monitor if the gradients are on a device.

    Args:
        parts: what it shares with the other recorders.
    """

    def __init__(self, parts: RecorderParts) -> None:
        self._layers, self._judge, self._hooks, self._losses = parts.layers, parts.judge, parts.hooks, parts.losses
        self._peers, self._sampling = parts.peers, parts.sampling
        self._skipping, self._applier = parts.skipping, parts.applier
        self._rows: DeferredRows | None = None

    @property
    def moves(self) -> bool:
        """True if rows under way are on another device than the next row, so that they have to be read first."""
        return self._rows is not None and self._rows.home != self._layers.home

    def forget(self) -> None:
        """Drop the rows under way and everything else kept on the device."""
        self._rows = None

    def send(
        self,
        now: Unread,
        source: Source,
        rate: Floats | None,
        mine: Gradients,
        optimizer: Optimizer | None,
        returned: Any,
        family: Family,
        word: Word | None,
        *,
        closely: bool,
    ) -> None:
        """Start the transfer of a row. What must be done to its gradients at once is decided on the device."""
        rows = self._require_rows()
        measured = mine.coming.before_clip.measured if mine.coming.before_clip is not None else None
        before = measured if isinstance(measured, Unread) else None
        loss, loss_source = self._losses.unread(mine.coming, returned, self._layers.home)
        if len(mine.coming.roots) > 1:
            self._judge.losses_add_up()
        facts = HostFacts(
            source=source,
            clipped=clip_seen(before=before is not None and mine.coming.clips),
            loss_source=loss_source,
            rate=rate,
            family=family,
            arrived=self._hooks.arrived,
            order=self._hooks.order,
            optimizer=mine.number,
            patience=self._losses.patience(found=False),
            word=word,
        )
        inside = source == "optimizer in backward"
        acts = not inside and source != "left out by the scaler" and clippable(source, optimizer)
        plan = self._possible_plan(mine, optimizer) if acts else None
        scale, own_norms = self._losses.unread_loss_scale(), self._hooks.own_norms()
        bad = rows.take(mine, now, before, facts, loss, scale, optimizer, plan, own_norms, closely=closely)
        if facts.sample is not None and facts.sample.unchanged is not None:
            self._hooks.look()
        if bad is not None:
            facts.problem = self._skipping.leave_out_where(bad, real=is_fused(optimizer))
        elif not inside:
            self._skipping.made()

    def _possible_plan(self, mine: Gradients, optimizer: Optimizer | None) -> DevicePlan | None:
        """Return the part of the judge's plan that is possible for these gradients; report the rest."""
        plan = self._judge.plan(self._require_rows().under_way)
        if plan is None:
            return None
        if plan.skip and not is_fused(optimizer):
            self._judge.note(
                "on a device, gradients that are not finite are set to zero, and no step is counted as skipped: of torch's "
                "optimizers only fused ones (fused=True) can leave a step out there."
            )
        clip = plan.clip or plan.reserve
        if clip is not None:
            knows = type(clip).apply_unread is not Clip.apply_unread
            obstacle = (
                self._applier.obstacle(clip, mine)
                if knows
                else f"{clip} has no apply_unread: it does not act on a device."
            )
            if obstacle:
                self._judge.note(obstacle)
                plan = replace(plan, clip=None, reserve=None)
        self._applier.slow(mine, optimizer, plan.rate)
        return plan

    def _require_rows(self) -> DeferredRows:
        home = self._layers.home
        if self._rows is None or self._rows.home != home:
            ranks, confirms = self._peers.ranks, self._judge.own_clip
            self._rows = DeferredRows(self._layers, self._sampling, home, ranks, confirms=confirms)
        return self._rows

    def rows(self, *, wait: bool) -> Iterator[tuple[Row, Decision, UnpackedRow]]:
        """Yield the rows that have arrived, not yet numbered, each with what was done and its values."""
        if self._rows is None:
            return
        for row, decision, numbers, problem in self._rows.rows(wait=wait):
            self._skipping.say(problem)
            self._peers.take(numbers, looked=row.weight_norm is not None)
            yield row, decision, numbers

    # When gradwatch itself fails.

    def look_for_failure(self) -> bool:
        """Return whether a row that reports a failure has arrived, which is at the same step in all processes."""
        return self._rows is not None and self._rows.look_for_failure()

    def tell_failure(self) -> None:
        """Take part in one exchange only to report that gradwatch failed in this process."""
        self._require_rows().tell_failure()
