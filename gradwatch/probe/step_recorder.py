"""From gradients to a row and back: measure, unite with other processes, have it judged, act.

On the CPU that happens at once. Where gradients live on a device, rows are read some steps later
(`gradwatch.probe.deferred_rows`).
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.autoclip.decision import NOTHING, Decision
from gradwatch.clips import Clip, Step
from gradwatch.distributed.agreement import PACE, differences, told
from gradwatch.distributed.group import Agreed, Local, Ranks, Unsupported, Word, find_ranks
from gradwatch.errors import PeerError, TrainingUnstableError
from gradwatch.measure.checkpoints import buffers_are_bad
from gradwatch.measure.layers import left_out
from gradwatch.measure.measured_gradients import Measured, assembled
from gradwatch.measure.packed_row import BUFFER_BAD, FLAGS
from gradwatch.measure.readback import LAG, PATIENCE, Unread, joined
from gradwatch.measure.sampling import Sample, Sampling
from gradwatch.probe import patches as taps
from gradwatch.probe.coming import BeforeClip
from gradwatch.probe.deferred_rows import DeferredRows, HostFacts
from gradwatch.probe.fast_path import FastPath
from gradwatch.probe.skipping import Skipping
from gradwatch.records import Clipped, Culprits, Family, LossSource, Provenance, Row, Source

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.coming import Coming
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.loss_source import LossReader
    from gradwatch.records import Floats


class StepRecorder:
    """The rows of one monitor.

    Args:
        layers: the watched parameters.
        judge: told of every row; held weakly.
        arrivals: which gradients came, and in which order.
        losses: what is known of the loss.
        every: optimizer steps between measurements.

    Attributes: ``every`` as above; ``step`` is the number of the coming row's step; ``over`` is True when nothing more can be
    measured.
    """

    def __init__(self, layers: Layers, judge: Judge, arrivals: GradientHooks, losses: LossReader, every: int) -> None:
        self._layers = layers
        self._judge = weakref.ref(judge)
        self._arrivals = arrivals
        self._losses = losses
        self.every = every
        self._sampling = Sampling(layers)
        self._last_provenance = Provenance()
        self._ranks: Ranks | None = None
        self._met = False
        self._due = False
        self._lame = False
        self._later: DeferredRows | None = None
        self._stop: TrainingUnstableError | None = None
        self.skipping = Skipping(layers, judge)
        self.buffers_are_well = True  # of all processes, when they were last looked at
        self._clipped_by_value: tuple[Row, Decision, float] | None = None
        self._after = 0.0
        self._left_out = 0  # steps in a row that the gradient scalers of all processes left out
        self._leaving = False
        self._alike = True  # the settings of all processes
        self._closely = False  # of several processes: one of them watches closely
        self.wish = 0  # ``every`` as the budget of this process would have it; of several processes the largest counts
        self.quiet: FastPath | None = None  # the short way, while nothing stirs
        self.closely = False
        self.alert = False  # the sentinel saw something: this step is measured whatever ``every`` says
        self.over = False
        self.step = 0

    def grow(self, news: set[int]) -> None:
        """Take the columns of layers that were added or whose parameter is another now."""
        self._leave_quiet()  # what the user's clip was given of this step is not lost
        self.catch_up(all_of_them=True)
        self._later = None
        self._sampling.grow(news)
        if self._ranks is not None:
            self._meet()

    def close(self) -> None:
        """Let go of processes and devices."""
        self._ranks = self._later = self.quiet = None

    def together(self) -> bool:
        """Return whether rows are exchanged with other processes, who are met at the first step."""
        if not self._met:
            self._meet()
        return self._ranks is not None

    # Before the user's own clip.

    def measure_before_clip(self, mine: Gradients) -> None:
        """Measure what the user is about to clip, unless it has been clipped already."""
        before, home = mine.coming.before_clip, self._layers.home
        if before is None or before.measured is None or not before.goes_on():
            before = None
        elif len(before.measured.columns) == len(mine.with_gradient()):
            return
        measured = mine.measure() if device.reading_is_free(home) else mine.measure_unread(home)
        if before is not None:
            measured = before.joined_by(measured, len(self._layers))
        mine.coming.before_clip = BeforeClip(mine.parameters, measured)

    def _leave_quiet(self) -> None:
        if self.quiet is not None:
            self.quiet.hand_over()
        self.quiet = None

    # One row.

    def tell_left_out(self, mine: Gradients) -> None:
        """Say of which layers nothing is seen."""
        if not (self._layers.untold or mine.left_out):
            return
        names = self._layers.names
        found = left_out([(names[column], reason) for column, reason in mine.left_out], "gradients")
        judge = self._judge()
        for sentence in self._layers.untold + [f"{one} No clip acts on them." for one in found]:
            if judge is not None:
                judge.note(sentence)
        self._layers.untold.clear()
        mine.left_out.clear()

    def expect(self) -> None:
        """A step is about to be measured: should anything fail from here on, other processes must not wait."""
        if self._ranks is not None:
            self._ranks.exchanged, self._due = False, True

    def expected(self) -> None:
        """It is over."""
        self._due = False

    def _is_due(self, steps: int) -> bool:
        """Meet the other processes and see to what is pending; False when this step leaves no row."""
        alert, self.alert = self.alert, False
        if self._ranks is None and self.wish:
            self.every = self.wish
        # of several processes, only what all of them know may decide: an alert is this one's alone
        seen = alert or self.closely if self._ranks is None else self._closely
        if self.every > 1 and steps % self.every and not seen:
            self.step += 1
            return False
        if not self._met:
            self._meet()
        elif self._ranks is not None and self._ranks.apart:
            self._part_company()
        if self._ranks is not None:
            self._ranks.exchanged = False
            self._due = True
        if self._leaving:
            self.over = True
            return False
        if self._lame:
            self._say_lame()
            return False
        if self._later is not None:
            self._read()
        if self._stop is not None:
            stop, self._stop = self._stop, None
            raise stop
        return True

    def take(self, mine: Gradients, source: Source, optimizer: Optimizer | None = None, returned: Any = None) -> bool:
        """Measure, ask the judge, act: all that happens between a backward and its update.

        Returns False when the optimizer itself leaves the step out, for the scaler found an overflow.
        """
        judge = self._judge()
        if judge is None:
            return True
        self.tell_left_out(mine)
        self._leave_quiet()
        free = device.reading_is_free(self._layers.home)
        scale = _fused_scale(optimizer) if free else 1.0
        if scale is None:
            return False
        mine.steps += 1
        if not self._is_due(mine.steps - 1):
            self.skipping.made()
            return True
        before = mine.coming.before_clip
        if before is not None and not before.holds:  # the user has put other gradients in their place
            mine.coming.before_clip = None
        if free:
            self._make(judge, mine, source, optimizer, returned, scale)
        else:
            rate = mine.rate(optimizer) if optimizer is not None else None
            now = mine.measure_unread(self._layers.home, getattr(optimizer, "grad_scale", None))
            self._send(now, source, rate, mine.family, mine.coming, mine, optimizer, returned)
        return True

    def _make(
        self, judge: Judge, mine: Gradients, source: Source, optimizer: Optimizer | None, returned: Any, scale: float
    ) -> None:
        """Make the row at once, and do what the judge says."""
        rate = mine.rate(optimizer) if optimizer is not None else None
        step, self.step = self.step, self.step + 1
        now = mine.measure(scale)
        before = mine.coming.before_clip
        whole = now if before is None else before.of(now)
        sampled = self._sampling.take(now, closely=self._looks_closely)
        row = self._row(step, source, now, whole, sampled, rate, mine, returned)
        if 0 < self._left_out < PATIENCE:  # now and then that is how scalers find their scale
            self.step = step
            return
        if sampled.weight_norm is None and self._ranks is None and judge.startled(row):
            looked = self._sampling.weights()
            row = row._replace(weight_norm=looked.weight_norm, nonfinite_weight=looked.nonfinite_weight)
        decision, coefficient = self._decide(judge, row, now, scale, mine, source, optimizer)
        if decision.skip:
            self.skipping.leave_out(row, decision, mine, source)
            return
        self.skipping.made()
        if decision is NOTHING:
            if source == "optimizer step" and scale == 1.0 and row.nonfinite is None:
                self._rest(judge, mine, optimizer, row, clipped=whole is not now)
        elif self._ranks is not None and decision.clip is not None and decision.clip.looks_inside:
            # what is left of the norm of the whole is known at the next exchange
            self._clipped_by_value = row, decision, now.global_norm
            self._after = self._ranks.part_of_square(mine.measure(scale))
        else:
            judge.done(row, decision, coefficient)

    @property
    def _looks_closely(self) -> bool:
        return self.closely if self._ranks is None else self._closely

    def _decide(
        self,
        judge: Judge,
        row: Row,
        now: Measured,
        scale: float,
        mine: Gradients,
        source: Source,
        optimizer: Optimizer | None,
    ) -> tuple[Decision, float]:
        """Judge a row and act on it; return what was decided, and the norm after over the norm before."""
        error: Exception | None = None
        decision, coefficient = NOTHING, 1.0
        try:
            decision = judge.judge(row)
            if decision is not NOTHING and not decision.skip:
                coefficient = self._act(decision, now, scale, mine, source, optimizer)
        except TrainingUnstableError:
            raise
        except Exception as failure:
            error = failure
        if self._ranks is not None and judge.may_clip and not self._ranks.all_well(well=error is None):
            # whoever has clipped has gone another way: nobody makes this step, and all leave at the next
            self._leaving = True
            self.skipping.leave_out(row, Decision(skip=True), mine, source)
            error = error or PeerError(
                "auto-clip failed in another process, whose output has the cause: no step is made"
            )
        if error is not None:
            raise error
        return decision, coefficient

    def _rest(self, judge: Judge, mine: Gradients, optimizer: Optimizer | None, row: Row, *, clipped: bool) -> None:
        """Let the coming rows go the short way, as far as nothing is due with them."""
        if self._ranks is not None or mine.sharded or optimizer is None:
            return
        bounds = judge.bounds()
        rows = min(bounds.rows, self._sampling.rest) if bounds is not None else 0
        if bounds is not None and (rows or self.every > 1):
            bounds = replace(bounds, rows=rows)
            self.quiet = FastPath(bounds, mine, optimizer, row.provenance.loss, self.every, clipped=clipped)

    @property
    def made(self) -> int:
        """The number of rows so far."""
        return self._sampling.rows

    def pass_quietly(self, optimizer: Optimizer) -> bool:
        """Record a step the short way, while nothing stirs; False, with nothing changed, where it has to go the long way."""
        quiet = self.quiet
        if quiet is None:
            return False
        passed = quiet.take(optimizer, self.step, self._losses)
        if passed == "noted":
            self._sampling.count()
        elif passed != "resting":
            self.alert = self.alert or passed == "with alarm"
            return False
        self.step += 1
        return True

    def _row(
        self,
        step: int,
        source: Source,
        now: Measured,
        whole: Measured,
        sampled: Sample,
        rate: Floats | None,
        mine: Gradients,
        returned: Any = None,
    ) -> Row:
        """Put together what was measured: ``whole`` before the user's clip, ``now`` as the optimizer sees it."""
        loss, loss_source = self._losses.read(mine.coming, returned)
        culprits, processes = None, 1
        if self._ranks is not None:
            leaves_out = source == "left out by the scaler"
            loss, loss_source, culprits = self._unite(loss, loss_source, whole, now, sampled, leaves_out=leaves_out)
            processes = self._ranks.size
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
            applied=1.0 if whole is now else _share_left(now, whole),
            dead_share=sampled.dead_share,
            unchanged=sampled.unchanged,
            arrived=self._arrivals.arrived,
            culprits=culprits,
            provenance=self._provenance(source, whole is not now, loss_source, processes),
        )

    def _provenance(self, source: Source, before: bool, loss: LossSource, processes: int) -> Provenance:  # noqa: FBT001
        last = self._last_provenance
        same = (last.source, last.loss, last.processes) == (source, loss, processes)
        if same and before is (last.clipped == "before the user's clip"):
            return last
        self._last_provenance = Provenance(source, self._seen_clip(before), loss, processes)
        return self._last_provenance

    def _seen_clip(self, before: bool) -> Clipped:  # noqa: FBT001
        if before:
            return "before the user's clip"
        return "no clip before it seen" if taps.USER_CLIP.installed else "as the optimizer sees it"

    def take_parts(self, parts: list[tuple[Measured | Unread, Floats]], family: Family, mine: Gradients) -> None:
        """Make one row of the steps that an optimizer made inside backward; too late to act on any of them."""
        judge = self._judge()
        if judge is None or not self._is_due(self.step):
            return
        rates = np.full((len(parts), len(self._layers)), np.nan)
        for place, (_, rate) in enumerate(parts):
            rates[place, : len(rate)] = rate
        rate = np.fmax.reduce(rates)
        source: Source = "optimizer in backward"
        if judge.orders() is not None:
            judge.note("auto-clip cannot act where the optimizer steps inside backward: it only watches there.")
        unread = [part for part, _ in parts if isinstance(part, Unread)]
        if unread:
            self._send(joined(unread), source, rate, family, mine.coming, None, None, None)
            return
        now = assembled([part for part, _ in parts if isinstance(part, Measured)], len(self._layers))
        step, self.step = self.step, self.step + 1
        sampled = self._sampling.take(now, closely=self._looks_closely)
        row = self._row(step, source, now, now, sampled, rate, mine)._replace(family=family, optimizer=-1)
        judge.judge(row._replace(poisoned=False))  # nothing is left to be kept from the optimizer

    def _act(
        self,
        decision: Decision,
        now: Measured,
        scale: float,
        mine: Gradients,
        source: Source,
        optimizer: Optimizer | None,
    ) -> float:
        """Do to the gradients what was decided; return the norm after over the norm before."""
        if decision.rate != 1.0:
            self._slow(mine, optimizer, decision.rate)
        if (
            decision.clip is not None
            and math.isfinite(now.global_norm)
            and self._clippable(source, optimizer)
            and self._fits(decision.clip, mine)
        ):
            step = Step(
                self._layers.names,
                now.gradients,
                mine.with_gradient(),
                now.columns,
                now.norms[now.columns],
                now.global_norm,
                scale,
            )
            return decision.clip.apply(step) if decision.guard is None else decision.guard.around(decision.clip, step)
        return 1.0

    def _slow(self, mine: Gradients, optimizer: Optimizer | None, rate: float) -> None:
        if optimizer is not None:
            mine.slow(optimizer, rate)
            return
        judge = self._judge()
        if judge is not None:
            judge.note("the learning rate is not known where no torch optimizer makes the update: it is not lowered.")

    def _clippable(self, source: Source, optimizer: Optimizer | None) -> bool:
        """False inside a line search: there the gradients belong to the search, and a clip would mislead it."""
        return source != "closure" or not isinstance(optimizer, torch.optim.LBFGS)

    def _fits(self, clip: Clip, mine: Gradients) -> bool:
        """False where the clip asks for what no process knows of parts of layers; it says so."""
        judge = self._judge()
        if judge is None or not (mine.sharded or (self._ranks is not None and self._ranks.sharded)):
            return True
        if clip.needs_whole_layers:
            judge.note(f"{clip} needs whole layers, and here each process holds parts of them: it does not act.")
            return False
        if clip.by_layer and mine.coming.before_clip is not None:
            judge.note(
                f"{clip} does not act after a clip of your own where layers are sharded: what that left of each whole "
                "layer is not known."
            )
            return False
        return True

    # Gradients on a device: rows come later.

    def _send(
        self,
        now: Unread,
        source: Source,
        rate: Floats | None,
        family: Family,
        coming: Coming,
        mine: Gradients | None,
        optimizer: Optimizer | None,
        returned: Any,
    ) -> None:
        """Send a row on its way; what must be done at once is decided on the device."""
        judge = self._judge()
        assert judge is not None
        later = self._require_later()
        measured = coming.before_clip.measured if coming.before_clip is not None else None
        before = measured if isinstance(measured, Unread) else None
        loss, loss_source = self._losses.unread(coming, returned, self._layers.home)
        facts = HostFacts(
            source, self._seen_clip(before is not None), loss_source, rate, family, self._arrivals.arrived
        )
        facts.optimizer = mine.number if mine is not None else -1
        acts = mine is not None and source != "left out by the scaler" and self._clippable(source, optimizer)
        orders = judge.orders() if acts else None
        if orders is not None and orders.skip and mine is not None and not mine.skips(optimizer):
            judge.note(
                "on a device, gradients that are not finite are set to zero, and no step is counted as skipped: of torch's "
                "optimizers only fused ones (fused=True) can leave a step out there."
            )
        clip = (orders.clip or orders.reserve) if orders is not None else None
        knows = clip is not None and (type(clip).apply_unread is not Clip.apply_unread)
        if clip is not None and not knows:
            judge.note(f"{clip} has no apply_unread: it does not act on a device.")
        if orders is not None and clip is not None and not (knows and mine is not None and self._fits(clip, mine)):
            orders = replace(orders, clip=None, reserve=None)
        if orders is not None and orders.rate != 1.0 and mine is not None:
            self._slow(mine, optimizer, orders.rate)
        own = self._arrivals.own_norms()
        if self._ranks is not None:
            facts.word = self._word(leaves_out=source == "left out by the scaler")
        bad = later.take(mine, now, before, facts, loss, optimizer, orders, own, closely=self._looks_closely)
        if bad is not None and mine is not None:
            facts.problem = self.skipping.leave_out_where(bad, real=mine.skips(optimizer))
        elif source != "optimizer in backward":
            self.skipping.made()

    def _require_later(self) -> DeferredRows:
        home = self._layers.home
        if self._later is None or self._later.home != home:
            self._read(wait=True)
            judge = self._judge()
            confirms = judge is not None and judge.own_clip
            self._later = DeferredRows(self._layers, self._sampling, home, self._ranks, confirms=confirms)
        return self._later

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """Wait for the rows that are still under way; of several processes only at the end, for they decide in step.

        That the run is unstable is not raised here but at the next step.
        """
        if self._later is not None and (self._ranks is None or all_of_them):
            try:
                self._read(wait=True)
            except TrainingUnstableError as stop:
                self._stop = stop

    def _read(self, wait: bool = False) -> None:  # noqa: FBT001, FBT002
        """Judge the rows that have come over from the device."""
        judge = self._judge()
        if self._later is None or judge is None:
            return
        for unnumbered, decision, numbers, problem in self._later.rows(wait=wait):
            self.skipping.say(problem)
            self._settle(numbers.after_norm)
            if self._ranks is not None:
                self._heed(self._ranks.agreed(numbers))
                if unnumbered.weight_norm is not None:
                    self.buffers_are_well = not (numbers.ranks[FLAGS] & BUFFER_BAD).any()
            row = unnumbered._replace(step=self.step)
            self.step += 1
            judge.judge(row)
            if decision is NOTHING:
                continue
            if self._ranks is not None and decision.clip is not None and decision.clip.looks_inside:
                self._clipped_by_value = row, decision, numbers.now_norm
            else:
                judge.done(row, decision, numbers.coefficient)

    # Other processes.

    def _meet(self) -> None:
        """At the first step, find the processes that train this model together, and make sure that all of them watch."""
        self._met = True
        self._ranks = None
        model, judge = self._layers.model, self._judge()
        if model is None or judge is None:
            return
        judge.together(0)
        try:
            ranks = find_ranks(model, self._layers)
        except Unsupported as finding:
            judge.note(f"{finding}: numbers and verdict are those of this process alone.")
            return
        if ranks is None:
            return
        settings = ranks.agree(judge.settings() | {"weights left out": ", ".join(self._layers.left_out)})
        if settings is None:
            judge.disarm(
                f"only some of the {ranks.size} processes watch this model, so that numbers are those of this process alone "
                "and auto-clip does not act: call attach() in each of them."
            )
            return
        if settings and not self._may_exchange(judge, differences(settings, ranks.world)):
            return
        self._ranks, self._alike = ranks, not settings
        if self._alike:
            judge.together(1 if device.reading_is_free(self._layers.home) else LAG)
        if ranks.averages:
            self._arrivals.stand_sentinel()

    @staticmethod
    def _may_exchange(judge: Judge, found: dict[str, str]) -> bool:
        """Say what differs between the processes, and only watch; False where not even their rows come at the same steps."""
        alone = not found.keys().isdisjoint(PACE)
        judge.disarm(
            f"the processes watch this model by different settings ({told(found)}), so that auto-clip does not act"
            + (" and numbers are those of this process alone" if alone else ", and each judges by its own")
            + ": give attach() the same in each of them."
        )
        return not alone

    def _word(self, *, leaves_out: bool) -> Word:
        """Return what this process says of itself with the coming row."""
        judge = self._judge()
        failed, decided = judge.said() if judge is not None else (0, 0)
        return Word(self.wish, self.closely, failed, decided, leaves_out)

    def _heed(self, agreed: Agreed) -> None:
        """Follow what all processes said with a row; in each of them at the same row."""
        judge = self._judge()
        self.every, self._closely = agreed.every or self.every, agreed.closely
        self._left_out = self._left_out + 1 if agreed.left_out else 0
        if judge is not None and agreed.failed and self._alike:
            judge.switch_off(agreed.failed)
        if judge is not None and agreed.parted:
            who = " and ".join(map(str, agreed.parted))
            judge.disarm(
                f"auto-clip has decided otherwise on rank {who} than on the first, so that parameters may differ between "
                "processes; from here on it does not act in any of them. Start again from a checkpoint that all of them load."
            )

    def _part_company(self) -> None:
        """From the first `model.join()` on some processes may have no more batches: each goes on by itself."""
        self.catch_up(all_of_them=True)
        self._ranks = self._later = self._clipped_by_value = None
        judge = self._judge()
        if judge is not None:
            judge.together(0)
            judge.disarm(
                "model.join() was used: from there on numbers are those of this process alone, and auto-clip does not act."
            )

    def _unite(
        self, loss: float, source: LossSource, whole: Measured, now: Measured, sampled: Sample, *, leaves_out: bool
    ) -> tuple[float, LossSource, Culprits | None]:
        """Make the numbers those of all processes, in place."""
        assert self._ranks is not None
        bad = any(not math.isfinite(norm.item()) for norm in self._arrivals.own_norms())
        model, looked = self._layers.model, sampled.weight_norm is not None
        buffer_bad = looked and model is not None and bool(buffers_are_bad(model, self._layers.home))
        word = self._word(leaves_out=leaves_out)
        mine = Local(loss if source != "none" else None, word, bad, self._after, buffer_bad)
        united = self._ranks.unite(mine, whole, now, sampled)
        if looked:
            self.buffers_are_well = not united.buffer_bad
        self._heed(united.agreed)
        self._after = 0.0
        self._settle(united.after_norm)
        if united.loss is None:
            return math.nan, "none", united.culprits
        return united.loss, source if source != "none" else "backward root", united.culprits

    def _settle(self, after_norm: float) -> None:
        """Tell what a clip by value left at the step before, now that all processes know."""
        judge = self._judge()
        if self._clipped_by_value is not None and judge is not None:
            row, decision, before = self._clipped_by_value
            self._clipped_by_value = None
            judge.done(row, decision, min(1.0, after_norm / before) if before > 0 else 1.0)

    def fail(self, error: Exception) -> None:
        """Switch off; where others wait for this process's rows, tell them first, now or at the next step."""
        if self._leaving:  # all processes do, at the next step
            pass
        elif self._ranks is None or isinstance(error, PeerError):
            self.over = True
        elif not self._lame:
            self._lame = True
            if self._due and not self._ranks.exchanged:
                self._say_lame()
        judge = self._judge()
        if judge is not None:
            judge.failed("measuring", error)

    def _say_lame(self) -> None:
        """Exchange the news that gradwatch failed here; leave in the step in which all processes know."""
        ranks = self._ranks
        if ranks is None:
            self.over = True
        elif device.reading_is_free(self._layers.home):
            ranks.tell_failure()
            self.over = True
        elif self._later is not None and self._later.failure_is_known():
            self.over = True
        else:
            self._require_later().tell_failure()


def _share_left(now: Measured, whole: Measured) -> float:
    """Return the norm after the user's clip over the norm before it."""
    if not math.isfinite(whole.global_norm) or not 0 < now.global_norm < whole.global_norm:
        return 1.0
    return now.global_norm / whole.global_norm


def _fused_scale(optimizer: Optimizer | None) -> float | None:
    """Return the loss scale that a fused optimizer still has to divide by; None when it will skip this step."""
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if overflow is not None and overflow.item() > 0:
        return None
    return 1.0 if scale is None else float(scale.item())
