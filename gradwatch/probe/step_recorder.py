"""One optimizer step, from gradients to a row and back: measure, combine with other processes, judge, act.

On the CPU this happens at once. Rows of gradients on a device are read some steps later
(`gradwatch.probe.device_recorder`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch import device
from gradwatch.autoclip.decision import NOTHING, Decision
from gradwatch.errors import PeerError, TrainingUnstableError
from gradwatch.measure.layers import left_out
from gradwatch.measure.measured_gradients import Measured
from gradwatch.measure.readback import Unread, joined
from gradwatch.measure.sampling import Sampling
from gradwatch.probe.applier import Applier
from gradwatch.probe.budget import Budget
from gradwatch.probe.coming import BeforeClip
from gradwatch.probe.device_recorder import DeviceRecorder
from gradwatch.probe.fast_path import FastPath, UserClip
from gradwatch.probe.host_recorder import HostRecorder
from gradwatch.probe.recorder_parts import RecorderParts
from gradwatch.probe.skipping import Skipping

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.distributed.words import Word
    from gradwatch.measure.layers import Layers
    from gradwatch.probe.gradient_hooks import GradientHooks
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.investigator import Investigator
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.loss_reader import LossReader
    from gradwatch.probe.peers import Peers
    from gradwatch.records import Family, Floats, OwnTime, Row, Source


class StepRecorder:
    """Makes the rows of one monitor.

    Args:
        layers: the watched parameters.
        judge: judges each row and decides what to do.
        gradient_hooks: know which gradients arrived, and in which order.
        losses: reads the loss of a step.
        peers: the other processes.
        every: number of optimizer steps between measurements, or a `Budget` that chooses it.
        own_time: the time that watching has taken so far.
        investigator: is told of rows that are not finite; None: nothing is.

    Attributes:
        step: step number of the next row.
        over: True if nothing more can be measured.
        peers: the other processes.
        skipping: leaves steps out.
    """

    def __init__(
        self,
        layers: Layers,
        judge: Judge,
        gradient_hooks: GradientHooks,
        losses: LossReader,
        peers: Peers,
        every: int | Budget,
        own_time: OwnTime,
        investigator: Investigator | None = None,
    ) -> None:
        self._layers = layers
        self._judge = judge
        self._hooks = gradient_hooks
        self._losses = losses
        self._own_time = own_time
        self.peers = peers
        self._budget = every if isinstance(every, Budget) else None
        self._every = every if isinstance(every, int) else 1
        self._wish = 0  # ``every`` as the budget of this process requests it; the largest of all processes counts
        self._sampling = Sampling(layers)
        self.skipping = Skipping(layers, judge)
        applier = Applier(layers, judge, peers)
        parts = RecorderParts(
            layers, judge, gradient_hooks, losses, peers, self._sampling, self.skipping, applier, investigator
        )
        self._investigator = investigator
        self._host = HostRecorder(parts)
        self._device = DeviceRecorder(parts)
        self._stop: TrainingUnstableError | None = None
        self._failed = False
        self._closely = False
        # True if the gradient of one layer or the loss was out of bounds: the step is measured whatever ``every`` says
        self._alert = False
        self._fast_path: FastPath | None = None  # while rows need not be judged
        self.over = False
        self.step = 0

    def grow(self, news: set[int]) -> None:
        """Extend everything to the columns in ``news``: layers that were added or whose parameter was replaced."""
        self._leave_fast_path()  # keeps the norms before the user's clip of this step
        self.catch_up(all_of_them=True)
        self._device.forget()
        self._sampling.grow(news)
        if self.peers.ranks is not None:
            self.peers.meet()

    @property
    def looks_at_model(self) -> bool:
        """True if parameters that were added or replaced are to be looked for before the coming row."""
        return self._sampling.looks and not self._hooks.hookless  # FSDP2 replaces parameters itself

    def go_on_from(self, step: int) -> None:
        """Set the step number of the next row, because a run was resumed."""
        self.step = step

    def close(self) -> None:
        """Stop exchanging rows with other processes and drop everything kept on devices."""
        self.peers.leave()
        self._device.forget()
        self._fast_path = None

    def meet_peers(self) -> bool:
        """Return whether rows are exchanged with other processes; find these at the first call."""
        return self.peers.ranks is not None if self.peers.met else self.peers.meet()

    # The fast path.

    @property
    def has_fast_path(self) -> bool:
        """True if the next step may take the fast path."""
        return self._fast_path is not None

    def take_fast_path(self, optimizer: Optimizer) -> bool:
        """Record a step on the fast path; return False if it has to be recorded by `take`, which then measures it anew."""
        fast_path = self._fast_path
        if fast_path is None:
            return False
        passed = fast_path.take(optimizer, self.step, self._losses)
        if passed == "noted":
            self._sampling.count()
        elif passed != "resting":
            self._alert = self._alert or passed == "with alarm"
            return False
        self.step += 1
        return True

    def _leave_fast_path(self) -> None:
        if self._fast_path is not None:
            self._fast_path.hand_over()
        self._fast_path = None

    def _enter_fast_path(self, mine: Gradients, optimizer: Optimizer | None, row: Row) -> None:
        """Let the next rows take the fast path, until one of them has to be judged or sampled."""
        if self.peers.ranks is not None or mine.sharded or optimizer is None:
            return
        if math.isnan(row.global_norm):  # no layer has a gradient
            return
        bounds = self._judge.bounds()
        rows = min(bounds.rows, self._sampling.rest) if bounds is not None else 0
        if bounds is not None and (rows or self._every > 1):
            bounds, before = replace(bounds, rows=rows), mine.coming.before_clip
            clip: UserClip | None = None if before is None else "bounded" if before.clips else "unbounded"
            self._fast_path = FastPath(bounds, mine, optimizer, row.provenance.loss, self._every, clip)

    # The user's own clip.

    @property
    def needs_norms_before_clip(self) -> bool:
        """False if the norm of the user's clip was computed here, or if the current step makes no row."""
        fast_path = self._fast_path
        return fast_path is None or not (fast_path.resting or fast_path.shared)

    def measure_before_clip(self, mine: Gradients) -> None:
        """Measure the gradients that the user is about to clip, except those that have been clipped in this step already."""
        before = mine.coming.before_clip
        if before is None or before.measured is None or not before.next_begins():
            before = None
        elif len(before.measured.columns) == len(mine.with_gradient()):
            return
        measured = mine.measure_at(self._layers.home)
        if before is not None:
            measured = before.joined_by(measured, len(self._layers))
        mine.coming.clip_begins(BeforeClip(mine.parameters, measured))

    def share_norm(self, gradients: list[Tensor]) -> Tensor | None:
        """Return the total norm of gradients that the user is about to clip; None if torch has to compute it."""
        return self._fast_path.share(gradients) if self._fast_path is not None else None

    def user_scaled(self, total: Tensor, max_norm: float) -> None:
        """Record that the user has clipped gradients of the norm ``total`` to ``max_norm``."""
        if self._fast_path is not None:
            self._fast_path.scaled(total, max_norm)

    def settle_norms(self) -> None:
        """Leave the fast path if the norms before the user's clip are still with it, so that they can be changed."""
        if self._fast_path is not None and self._fast_path.shared:
            self._leave_fast_path()

    # One row.

    def _follow(self) -> None:
        """While an explosion is open, follow the order of arrival and sample the weights at each step."""
        self._closely = self._judge.exploding
        self._hooks.follow(closely=self._closely)

    @property
    def _looks_closely(self) -> bool:
        return self._closely if self.peers.ranks is None else self.peers.closely

    def report_left_out(self, mine: Gradients) -> None:
        """Report the layers that cannot be measured."""
        if not (self._layers.untold or mine.left_out):
            return
        names = self._layers.names
        found = left_out([(names[column], reason) for column, reason in mine.left_out], "gradients")
        for sentence in self._layers.take_untold() + [f"{one} No clip acts on them." for one in found]:
            self._judge.note(sentence)
        mine.left_out.clear()

    def _begin_row(self, steps: int) -> bool:
        """Find the other processes and process what is pending; return False if this step makes no row.

        Raises:
            TrainingUnstableError: a row that has arrived from the device stops the run.
        """
        if self._choose_pace(steps):
            self.step += 1
            return False
        if not self.peers.met:
            self.peers.meet()
        elif self.peers.apart:
            self.catch_up(all_of_them=True)
            self._device.forget()
            self.peers.part_company()
        self.peers.expect_row()
        if self.peers.leaving:
            self.over = True
            return False
        if self._failed:
            self._announce_failure()
            return False
        self._read()
        if self._stop is not None:
            stop, self._stop = self._stop, None
            raise stop
        return True

    def _choose_pace(self, steps: int) -> bool:
        """Choose ``every``; return True if the step with number ``steps`` of the optimizer makes no row."""
        alert, self._alert = self._alert, False
        if self.peers.ranks is not None:  # only what all processes know may decide: an alert is known to this one alone
            self._every, unusual = self.peers.every or self._every, self.peers.closely
        else:
            self._every, unusual = self._wish or self._every, alert or self._closely
        return self._every > 1 and steps % self._every != 0 and not unusual

    def take(self, mine: Gradients, source: Source, optimizer: Optimizer | None = None, returned: Any = None) -> bool:
        """Do everything that happens between a backward and its update: measure, ask the judge, act.

        Args:
            mine: gradients that the step will use.
            source: the moment at which they are measured.
            optimizer: optimizer that makes the step; None if there is none.
            returned: return value of the closure; None if there is none.

        Returns:
            False if the optimizer itself leaves the step out, because the gradient scaler found an overflow.
        """
        if self._budget is not None:
            self._wish = self._budget.every(self._own_time.seconds, self.step, self._sampling.rows)
        self.report_left_out(mine)
        self._leave_fast_path()
        free = device.reading_is_free(self._layers.home)
        scale = _fused_scale(optimizer) if free else 1.0
        if scale is None:
            return False
        mine.count_step()
        if not self._begin_row(mine.steps - 1):
            self.skipping.made()
            return True
        before = mine.coming.before_clip
        if before is not None and not before.holds:  # the user has replaced the gradients
            mine.coming.forget_clip()
        if free:
            self._make(mine, source, optimizer, returned, scale)
        else:
            self._send(mine, source, optimizer, returned)
        return True

    def _word(self, source: Source) -> Word | None:
        """Return what this process states about itself with the next row; None if there are no others."""
        if self.peers.ranks is None:
            return None
        leaves_out = source == "left out by the scaler"
        return self.peers.word(every=self._wish, closely=self._closely, leaves_out=leaves_out)

    def _make(self, mine: Gradients, source: Source, optimizer: Optimizer | None, returned: Any, scale: float) -> None:
        """Make the row at once, and let the next rows take the fast path if possible."""
        self._read_all_before_moving()
        step, self.step = self.step, self.step + 1
        row, decision = self._host.make(
            step, mine, source, optimizer, returned, scale, self._word(source), closely=self._looks_closely
        )
        if row is None:
            self.step = step
            return
        self._follow()
        if decision is NOTHING and source == "optimizer step" and scale == 1.0 and row.nonfinite is None:
            self._enter_fast_path(mine, optimizer, row)

    def _send(self, mine: Gradients, source: Source, optimizer: Optimizer | None, returned: Any) -> None:
        """Start the transfer of the row from the device."""
        rate = mine.rate(optimizer, anew=self._sampling.rest == 0) if optimizer is not None else None
        now = mine.measure_unread(self._layers.home, getattr(optimizer, "grad_scale", None))
        self._read_all_before_moving()
        if self._investigator is not None:
            self._investigator.row_sent()
        self._device.send(
            *(now, source, rate, mine, optimizer, returned, mine.family, self._word(source)),
            closely=self._looks_closely,
        )

    def _read_all_before_moving(self) -> None:
        if self._device.moves:
            self._read(wait=True)
            self._device.forget()

    def take_parts(self, parts: list[tuple[Measured | Unread, Floats]], family: Family, mine: Gradients) -> None:
        """Make one row of the steps that an optimizer made inside backward, on which auto-clip can no longer act."""
        if not self._begin_row(self.step):
            return
        rates = np.full((len(parts), len(self._layers)), np.nan)
        for index, (_, rate) in enumerate(parts):
            rates[index, : len(rate)] = rate
        rate = np.fmax.reduce(rates)
        source: Source = "optimizer in backward"
        if self._judge.plan() is not None:
            self._judge.note("auto-clip cannot act where the optimizer steps inside backward: it only watches there.")
        word, closely = self._word(source), self._looks_closely
        unread = [part for part, _ in parts if isinstance(part, Unread)]
        if unread:
            self._read_all_before_moving()
            self._device.send(joined(unread), source, rate, mine, None, None, family, word, closely=closely)
            return
        self._read_all_before_moving()
        step, self.step = self.step, self.step + 1
        measured = [part for part, _ in parts if isinstance(part, Measured)]
        self._host.make_of_parts(step, measured, rate, family, mine, word, closely=closely)
        self._follow()

    # Gradients on a device: rows come later.

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """Wait for the rows under way and judge them.

        With several processes this happens only if ``all_of_them``, since they read rows at the same steps. A
        `TrainingUnstableError` is not raised here but at the next step.
        """
        if self.peers.ranks is None or all_of_them:
            try:
                self._read(wait=True)
            except TrainingUnstableError as stop:
                self._stop = stop

    def _read(self, wait: bool = False) -> None:  # noqa: FBT001, FBT002
        """Judge the rows that have arrived from the device; all rows under way if ``wait``."""
        for unnumbered, done, numbers in self._device.rows(wait=wait):
            row = unnumbered._replace(step=self.step)
            self.step += 1
            if self._investigator is not None:
                self._investigator.row_arrived(row)
            decided = self._judge.judge(row)
            # auto-clip may be on, and have left this step as it was
            decision = Decision() if done is NOTHING and decided is not NOTHING else done
            self._follow()
            if self.peers.ranks is not None and decision.clip is not None and decision.clip.looks_inside:
                self.peers.clipped_by_value(row, decision, numbers.now_norm)
            else:
                self._judge.done(row, decision, numbers.coefficient)

    # When gradwatch itself fails.

    def fail(self, error: Exception) -> None:
        """Switch off. In distributed runs, announce the failure in the next exchange, so that all stop at the same step."""
        if self.peers.leaving:  # all processes do, at the next step
            pass
        elif self.peers.ranks is None or isinstance(error, PeerError):
            self.over = True
        elif not self._failed:
            self._failed = True
            if self.peers.others_wait:
                self._announce_failure()
        self._judge.part_failed("measuring", error)

    def _announce_failure(self) -> None:
        """Tell the other processes that gradwatch failed here, and stop at the step at which all of them know."""
        ranks = self.peers.ranks
        if ranks is None:
            self.over = True
        elif device.reading_is_free(self._layers.home):
            ranks.tell_failure()
            self.over = True
        elif self._device.look_for_failure():
            self.over = True
        else:
            self._device.tell_failure()


def _fused_scale(optimizer: Optimizer | None) -> float | None:
    """Return the loss scale by which a fused optimizer has yet to divide; None if it will skip this step."""
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if overflow is not None and overflow.item() > 0:
        return None
    return 1.0 if scale is None else float(scale.item())
