"""Rows of gradients on the CPU: made, judged and acted on before the optimizer makes its step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch.autoclip.decision import NOTHING, Decision
from gradwatch.errors import PeerError, TrainingUnstableError
from gradwatch.measure.measured_gradients import assembled
from gradwatch.probe.patches import clip_seen
from gradwatch.records import Provenance, Row

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.distributed.words import Word
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.sampling import Sample
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.recorder_parts import RecorderParts
    from gradwatch.records import Family, Floats, LossSource, Source


class HostRecorder:
    """Makes the rows of one monitor if the gradients are on the CPU.

    Args:
        parts: what it shares with the other recorders.
    """

    def __init__(self, parts: RecorderParts) -> None:
        self._layers, self._judge, self._hooks, self._losses = parts.layers, parts.judge, parts.hooks, parts.losses
        self._peers, self._sampling = parts.peers, parts.sampling
        self._skipping, self._applier = parts.skipping, parts.applier
        self._investigator = parts.investigator
        self._last_provenance = Provenance()

    def make(
        self,
        step: int,
        mine: Gradients,
        source: Source,
        optimizer: Optimizer | None,
        returned: Any,
        scale: float,
        word: Word | None,
        *,
        closely: bool,
    ) -> tuple[Row | None, Decision]:
        """Make the row of a step, have it judged and apply the decision; return both.

        The row is None, and nothing is done, if the gradient scalers of all processes leave the step out.
        """
        rate = mine.rate(optimizer, anew=self._sampling.rest == 0) if optimizer is not None else None
        now = mine.measure(scale)
        before = mine.coming.before_clip
        whole = now if before is None else before.of(now)
        sampled = self._sampling.take(now, rate, closely=closely)
        if sampled.unchanged is not None:
            self._hooks.look()
        row = self._row(step, source, now, whole, sampled, rate, mine, returned, word)
        left_out = self._peers.left_out
        # scalers leave out some steps while they search for their scale
        if left_out and left_out < self._losses.patience(found=mine.steps > 0):
            return None, NOTHING
        if sampled.weight_norm is None and self._peers.ranks is None and self._judge.is_unusual(row):
            looked = self._sampling.weights()
            row = row._replace(weight_norm=looked.weight_norm, nonfinite_weight=looked.nonfinite_weight)
        if self._investigator is not None and (row.nonfinite is not None or row.poisoned):
            self._investigator.gradients_arrived(row, self._peers.together)
        decision, coefficient = self._decide(row, now, scale, mine, source, optimizer)
        if decision.skip:
            self._skipping.leave_out(row, decision, mine, source)
            return row, decision
        self._skipping.made()
        if self._peers.ranks is not None and decision.clip is not None and decision.clip.looks_inside:
            self._peers.clipped_by_value(row, decision, now.global_norm, mine.measure(scale))
        else:
            self._judge.done(row, decision, coefficient)
        return row, decision

    def make_of_parts(
        self,
        step: int,
        parts: list[Measured],
        rate: Floats,
        family: Family,
        mine: Gradients,
        word: Word | None,
        *,
        closely: bool,
    ) -> None:
        """Make and judge one row of the steps that an optimizer made inside backward, on which nothing can act."""
        now = assembled(parts, len(self._layers))
        sampled = self._sampling.take(now, rate, closely=closely)
        row = self._row(step, "optimizer in backward", now, now, sampled, rate, mine, None, word)
        row = row._replace(family=family, optimizer=-1, poisoned=False)
        if self._investigator is not None and row.nonfinite is not None:
            self._investigator.gradients_arrived(row, self._peers.together)
        self._judge.judge(row)
        self._judge.done(row, NOTHING, 1.0)

    def _decide(
        self, row: Row, now: Measured, scale: float, mine: Gradients, source: Source, optimizer: Optimizer | None
    ) -> tuple[Decision, float]:
        """Judge a row and apply the decision; return it, and the norm after over the norm before."""
        error: Exception | None = None
        decision, coefficient = NOTHING, 1.0
        try:
            decision = self._judge.judge(row)
            if decision is not NOTHING and not decision.skip:
                coefficient = self._applier.apply(decision, row, now, scale, mine, source, optimizer)
        except TrainingUnstableError:
            raise
        except Exception as failure:
            error = failure
        if self._peers.confirm_clip(well=error is None):
            # gradients may now differ between processes, so none of them makes this step
            self._skipping.leave_out(row, Decision(skip=True), mine, source)
            error = error or PeerError(
                "auto-clip failed in another process, whose output shows the cause: no step is made"
            )
        if error is not None:
            raise error
        return decision, coefficient

    def _row(
        self,
        step: int,
        source: Source,
        now: Measured,
        whole: Measured,
        sampled: Sample,
        rate: Floats | None,
        mine: Gradients,
        returned: Any,
        word: Word | None,
    ) -> Row:
        """Return the row of what was measured: ``whole`` before the user's clip, ``now`` as the optimizer sees it."""
        loss, loss_source = self._losses.read(mine.coming, returned)
        if len(mine.coming.roots) > 1:
            self._judge.losses_add_up()
        culprits, processes, limit = None, self._peers.count, mine.clips_to()
        if word is not None:
            loss, loss_source, culprits = self._peers.unite(word, loss, loss_source, whole, now, sampled)
        return Row(
            step=step,
            loss=loss,
            grad_norm=whole.norms,
            global_norm=whole.global_norm,
            weight_norm=sampled.weight_norm,
            nonfinite=whole.nonfinite,
            nonfinite_weight=sampled.nonfinite_weight,
            counts=whole.counts,
            # of several processes, some may hold no gradient
            poisoned=not math.isfinite(now.global_norm) and (processes > 1 or bool(now.gradients)),
            rate=rate,
            family=mine.family,
            optimizer=mine.number,
            applied=1.0 if whole is now and limit is None else _share_left(now.global_norm, whole.global_norm, limit),
            dead_share=sampled.dead_share,
            unchanged=sampled.unchanged,
            arrived=self._hooks.arrived,
            order=self._hooks.order,
            culprits=culprits,
            buffers_well=self._peers.look_at_buffers() if sampled.weight_norm is not None else None,
            provenance=self._provenance(
                source, (whole is not now and mine.coming.clips) or limit is not None, loss_source, processes
            ),
            loss_scale=self._losses.loss_scale(),
        )

    def _provenance(self, source: Source, before: bool, loss: LossSource, processes: int) -> Provenance:  # noqa: FBT001
        last = self._last_provenance
        same = (last.source, last.loss, last.processes) == (source, loss, processes)
        if same and before is (last.clipped == "before the user's clip"):
            return last
        self._last_provenance = Provenance(source, clip_seen(before=before), loss, processes)
        return self._last_provenance


def _share_left(now: float, whole: float, limit: float | None) -> float:
    """Return the norm after the user's clip over the norm before it, at most 1.0; 1.0 if that is unknown.

    ``limit`` is the norm that the optimizer will clip to in its step; None if it will not.
    """
    left = now if limit is None else min(now, limit)
    return left / whole if math.isfinite(whole) and 0 <= left < whole else 1.0
