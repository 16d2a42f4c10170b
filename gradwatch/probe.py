"""What sits on the model and its optimizer, and when it acts: one row just before each update.

One process-wide pair of optimizer hooks serves all probes. With the post-accumulate hooks of `gradwatch.arrivals` these
are all the hooks there are. A probe knows the model weakly, so it never keeps it alive.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from gradwatch import device, hooks, taps
from gradwatch.arrivals import Arrivals
from gradwatch.autoclip import NOTHING
from gradwatch.clips import Clip
from gradwatch.columns import widened
from gradwatch.device import Unread, joined
from gradwatch.errors import ExchangeError, PeerError, TrainingUnstableError, UsageError
from gradwatch.gradients import Gradients, Measured, assembled
from gradwatch.later import Facts, Later
from gradwatch.losses import Losses
from gradwatch.measure import norm_of
from gradwatch.ranks import Local, Ranks, Unsupported, find_ranks
from gradwatch.records import Clipped, Culprits, Family, LossSource, Provenance, Row, Source
from gradwatch.sampling import Sample, Sampling
from gradwatch.wrappers import local_of, unmeasurable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.autoclip import Decision, Orders
    from gradwatch.layers import Layers
    from gradwatch.records import Floats

_UNDECIDED = 16  # steps of optimizers that own no watched layer after which a loop is taken to have none of its own


class Judge(Protocol):
    """Whom a probe reports to: the monitor."""

    def optimizer_found(self, optimizer: Optimizer) -> None:
        """An optimizer of the watched parameters is about to make its first step."""

    def judge(self, row: Row) -> Decision:
        """Take a row; say what to do with its gradients. `done` follows, unless that is nothing."""

    def orders(self) -> Orders | None:
        """Say what to do with a step before it is known; None: only watch it."""

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """Take note of what was done to them."""

    def grown(self, layers: Layers) -> None:
        """Parameters were added to the model or replaced."""

    def note(self, text: str) -> None:
        """Say once what cannot be done."""

    def failed(self, part: str, error: Exception) -> None:
        """Take note of an error inside gradwatch; raises it when strict."""


class Probe:
    """The hooks of one monitor.

    Args:
        layers: the watched parameters.
        judge: told of every row; held weakly.
        every: optimizer steps between measurements.
        scaler: the gradient scaler; None: found when it steps.
    """

    def __init__(
        self, layers: Layers, judge: Judge, every: int = 1, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self._layers = layers
        self._judge = weakref.ref(judge)
        self._every = every
        self._sampling = Sampling(layers)
        self._known: dict[int, Gradients] = {}  # by the optimizer's id
        self._owners = False
        self._all: Gradients | None = None
        self._loop: Literal["unknown", "optimizer", "backward", "explicit"] = "unknown"
        self._vain_steps = self._vain_at = 0
        self._backwards_then = 0
        self._left_out = self._left_out_before = 0
        self._weights_then = math.nan
        self._before_clip: Measured | Unread | None = None
        self._inside: list[tuple[Measured | Unread, Floats]] = []
        self._inside_seen: set[int] = set()
        self._inside_family: Family = "other"
        self._last_provenance = Provenance()
        self._stray: Tensor | None = None
        self._ranks: Ranks | None = None
        self._met = False
        self._due = False
        self._lame = False
        self._later: Later | None = None
        self._stop: TrainingUnstableError | None = None
        self._may_act = True
        self._clipped_by_value: tuple[Row, Decision, float] | None = None
        self._after = 0.0
        self._stepping: weakref.ref[Optimizer] | None = None
        self._stepping_at = -1
        self._closely = False
        self.arrivals = Arrivals(layers)
        self.losses = Losses(scaler)
        self.active = False
        self.backwards = 0
        self.step = 0
        self.seconds = 0.0

    # Life.

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Put every hook in place."""
        self.active = True
        if optimizer is not None:
            self._find(optimizer)
        self.arrivals.start()
        hooks.listen(self)
        for tap in taps.ALL:
            tap.add(self)

    def stop(self) -> None:
        """Remove every hook and give back what was hidden."""
        try:
            self.catch_up(all_of_them=True)
        finally:
            self._give_up()
            hooks.unlisten(self)

    def _give_up(self) -> None:
        """Stop, but for the process-wide hooks: torch may be walking over them right now."""
        self.active = False
        self.arrivals.stop()
        for tap in taps.ALL:
            tap.remove(self)
        for gradients in tuple(self._known.values()):
            gradients.restore()
        self._known.clear()  # a monitor that is kept for its summary shall not keep the parameters
        self._all = self._ranks = self._later = None

    def owns_any(self, optimizer: Optimizer) -> bool:
        """True when the optimizer holds at least one watched parameter."""
        return any(self._layers.column(p) is not None for group in optimizer.param_groups for p in group["params"])

    def watch_closely(self, *, closely: bool) -> None:
        """Follow the order of arrival and sample the weights on each step, while an incident is open."""
        self._closely = closely
        self.arrivals.follow(closely=closely)

    # The taps.

    def backward_begins(self) -> None:
        """See `taps.Listener`."""
        if self.arrivals.hookless:
            self._guarded(self.arrivals.begin)
        if self.losses.pending and self._gradients_cleared():  # the user left a step out: its loss belongs to no row
            self.losses.forget()

    def backward_failed(self) -> None:
        """See `taps.Listener`."""
        self.arrivals.failed()

    def backward_ended(self, root: Tensor | None, callers: Collection[int]) -> None:
        """See `taps.Listener`."""
        reached = self._guarded(self.arrivals.end, callers) if self.arrivals.hookless else self.arrivals.end(callers)
        if not reached and not self._inside:  # another model's backward, or one that passed by the marker
            self.arrivals.missed(enough=self._loop == "backward")
            self._stray = root
            return
        self.backwards += 1
        self._before_clip = None  # what was clipped before this backward was not stepped with
        if root is not None:
            self.losses.add_root(root)
        if self._inside:
            self._guarded(self._end_of_fused_backward)
        elif self._loop == "backward" or (self._loop == "unknown" and not self._owners):
            self._guarded(self._end_of_backward)

    def _gradients_cleared(self) -> bool:
        marker = self._layers.parameter(self.arrivals.marker)
        if marker is None:
            return False
        return marker.grad is None or (marker.grad.is_cpu and not marker.grad.any())

    def _end_of_backward(self) -> None:
        """In a loop without a torch optimizer, the end of backward is the last moment before the update."""
        if self._loop == "unknown" and not self._updates_without_optimizer():
            return
        self._loop = "backward"
        self._measure(self._everything(), "end of backward")

    def _updates_without_optimizer(self) -> bool:
        """True when the weights moved although no optimizer of theirs stepped, or another one keeps stepping in vain."""
        parameters = [parameter for _, parameter in self._layers.parameters()]
        if all(device.reading_is_free(parameter.device) for parameter in parameters):
            now = sum(norm_of(parameter) for parameter in parameters)
        else:  # torch counts the changes in place of each tensor
            now = float(sum(local_of(parameter)._version for parameter in parameters))
        then, self._weights_then = self._weights_then, now
        moved = not math.isnan(then) and self._weights_then != then
        return moved or self._vain_steps >= _UNDECIDED

    def user_clips(self, gradients: Sequence[Tensor]) -> None:
        """See `taps.Listener`: the user's first clip of a step is the last moment to see the gradients whole."""
        if self._before_clip is not None or not gradients:
            return
        mine = self._everything()
        if any(parameter.grad is gradients[0] for parameter in mine.parameters):
            self._guarded(self._measure_before_clip, mine)

    def _measure_before_clip(self, mine: Gradients) -> None:
        home = self._layers.home
        self._before_clip = mine.measure() if device.reading_is_free(home) else mine.measure_unread(home)

    def scaler_steps(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """See `taps.Listener`."""
        if self._guarded(self._gradients_of, optimizer) is not None:
            self.losses.scaler = scaler
            self._left_out_before = self._left_out
            self._left_out += 1

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """See `taps.Listener`: now and then a step is left out to find the scale; many in a row are a fault."""
        mine = self._guarded(self._gradients_of, optimizer)
        if mine is not None and self._left_out > self._left_out_before:
            if self._left_out >= device.PATIENCE:
                self._guarded(self._measure, mine, "left out by the scaler", optimizer)
            self.losses.forget()
        self.losses.scaler = None

    # The optimizer's hooks.

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Measure what the optimizer is about to use; return new arguments when it has a closure."""
        return self._guarded(self._prepare, optimizer, args, kwargs)

    def _prepare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._ranks is not None:  # should anything fail from here on, the others must not wait
            self._ranks.exchanged, self._due = False, True
        changed = self._prepare_step(optimizer, args, kwargs)
        self._due = False
        return changed

    def _prepare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        mine = self._gradients_of(optimizer)
        # an optimizer that steps inside another's step (super().step(), a wrapper) belongs to it; a step that raised never
        # came to its end, but then another backward has been since
        again = self._stepping is not None and self._stepping_at == self.backwards
        if mine is None and self.backwards > self._vain_at:  # another optimizer steps after a backward of this model
            self._vain_steps, self._vain_at = self._vain_steps + 1, self.backwards
        if mine is None or again:
            return None
        self._stepping, self._stepping_at = weakref.ref(optimizer), self.backwards
        if torch._C._current_graph_task_id() != -1:  # fused into backward: one step for each parameter
            self._step_inside_backward(mine, optimizer)
            return None
        self.backwards += self.arrivals.end()  # a backward that passed by the tap
        if self.backwards == self._backwards_then:
            self.arrivals.missed(enough=True)
        self._backwards_then = self.backwards
        if self._loop != "explicit":
            self._loop = "optimizer"
        mine.restore()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            if self._loop == "optimizer":
                self._measure(mine, "optimizer step", optimizer)
            return None
        wrapped = self._wrap(closure, mine, optimizer)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _step_inside_backward(self, mine: Gradients, optimizer: Optimizer) -> None:
        self._loop = "optimizer"
        home = self._layers.home
        part = mine.measure() if device.reading_is_free(home) else mine.measure_unread(home)
        columns = part.columns.tolist()
        if not self._inside_seen.isdisjoint(columns):  # the end of that backward passed by the tap
            self._end_of_fused_backward()
        self._inside_seen.update(columns)
        self._inside.append((part, mine.rate(optimizer)))
        self._inside_family = mine.family

    def _end_of_fused_backward(self) -> None:
        """Make one row of the steps that an optimizer made inside backward; too late to act on any of them."""
        judge = self._judge()
        parts, self._inside = self._inside, []
        self._inside_seen.clear()
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
            self._send(joined(unread), source, rate, self._inside_family, None, None, None, None)
            return
        now = assembled([part for part, _ in parts if isinstance(part, Measured)], len(self._layers))
        step, self.step = self.step, self.step + 1
        sampled = self._sampling.take(now, closely=self._closely)
        row = self._row(step, source, now, now, sampled, rate, self._inside_family)
        judge.judge(row._replace(poisoned=False))  # nothing is left to be kept from the optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        """Give back the gradients that were hidden so that the optimizer skipped them."""
        mine = self._known.get(id(optimizer))
        if mine is not None and mine.parameters:
            mine.restore()
            if self._stepping is not None and self._stepping() is optimizer:
                self._stepping = None

    def _wrap(self, closure: Callable[[], Any], mine: Gradients, optimizer: Optimizer) -> Callable[[], Any]:
        evaluations = 0

        def wrapped() -> Any:
            nonlocal evaluations
            with torch.enable_grad():
                loss = closure()
            evaluations += 1
            if evaluations == 1 and self._loop == "optimizer":  # a line search evaluates several times for one step
                self._guarded(self._measure, mine, "closure", optimizer, loss)
            return loss

        return wrapped

    def explicit_step(self) -> None:
        """The user says that the update is about to happen."""
        self._loop = "explicit"
        self._guarded(self._measure, self._everything(), "monitor.step()")

    def _gradients_of(self, optimizer: Optimizer) -> Gradients | None:
        """Return the gradients of the watched layers that an optimizer owns; None when it owns none."""
        mine = self._known.get(id(optimizer))
        if mine is None or mine.is_stale(optimizer):
            mine = self._find(optimizer)
        return mine if mine.parameters else None

    def _find(self, optimizer: Optimizer) -> Gradients:
        """Look up which watched layers an optimizer owns; the model may have changed since attach."""
        held = [(p, number) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
        if any(self._layers.column(p) is None for p, _ in held):
            news = self._layers.look_again()
            if news:
                self._grow(news)
        pairs, groups = [], []
        for parameter, number in held:
            column = self._layers.column(parameter)
            if column is not None:
                pairs.append((column, parameter))
                groups.append(number)
        mine = Gradients(pairs, len(self._layers), groups, len(held), optimizer)
        known = self._known
        known[id(optimizer)] = mine
        weakref.finalize(optimizer, known.pop, id(optimizer), None).atexit = False
        judge = self._judge()
        if pairs and judge is not None:
            self._owners = True
            judge.optimizer_found(optimizer)
            reason = unmeasurable(optimizer=optimizer)
            if reason is not None:
                raise UsageError(f"{type(optimizer).__name__} cannot be watched: {reason}.")
        return mine

    def _grow(self, news: set[int]) -> None:
        """Follow parameters that were added or replaced: adapters, a new head, `load_state_dict(assign=True)`."""
        for gradients in tuple(self._known.values()):
            gradients.restore()
        self._known.clear()
        self._all = None
        if isinstance(self._before_clip, Measured):
            self._before_clip.norms = widened(self._before_clip.norms, len(self._layers), math.nan)
        if self._stray is not None:  # the backward just now was this model's, by parameters not known then
            self.losses.add_root(self._stray)
        self.catch_up(all_of_them=True)
        self._later = None
        self._sampling.grow(news)
        self.arrivals.grow()
        if self._ranks is not None:
            self._meet()
        judge = self._judge()
        if judge is not None:
            judge.grown(self._layers)

    def _everything(self) -> Gradients:
        if self._all is None:
            self._all = Gradients(list(self._layers.parameters()), len(self._layers))
        return self._all

    # One row.

    def _is_due(self, steps: int) -> bool:
        """Meet the other processes and see to what is pending; False when this step leaves no row."""
        if self._every > 1 and steps % self._every and not self._closely:
            self.step += 1
            self.losses.spend()
            return False
        if not self._met:
            self._meet()
        elif self._ranks is not None and self._ranks.apart:
            self._part_company()
        if self._ranks is not None:
            self._ranks.exchanged = False
            self._due = True
        if self._lame:
            self._say_lame()
            return False
        if self._later is not None:
            self._read()
        if self._stop is not None:
            stop, self._stop = self._stop, None
            raise stop
        return True

    def _measure(
        self, mine: Gradients, source: Source, optimizer: Optimizer | None = None, returned: Any = None
    ) -> None:
        """Measure, ask the judge, act: all that happens between a backward and its update."""
        judge = self._judge()
        if judge is None:
            return
        free = device.reading_is_free(self._layers.home)
        scale = _fused_scale(optimizer) if free else 1.0
        if scale is None:  # the optimizer itself leaves the step out: the scaler found an overflow
            return
        if source != "left out by the scaler":
            self._left_out = 0
        mine.steps += 1
        if not self._is_due(mine.steps - 1):
            return
        rate = mine.rate(optimizer) if optimizer is not None else None
        if not free:
            now_unread = mine.measure_unread(self._layers.home, getattr(optimizer, "grad_scale", None))
            self._send(now_unread, source, rate, mine.family, mine, optimizer, returned, self._before_clip)
            return
        step, self.step = self.step, self.step + 1
        now = mine.measure(scale)
        whole = self._before_clip.only(mine.columns) if isinstance(self._before_clip, Measured) else now
        sampled = self._sampling.take(now, closely=self._closely)
        row = self._row(step, source, now, whole, sampled, rate, mine.family, returned)
        try:
            decision = judge.judge(row)
        except TrainingUnstableError:
            self._stepping = None  # a user who steps again all the same is judged again
            raise
        if decision is NOTHING:
            return
        coefficient = self._act(decision, now, scale, mine, source, optimizer)
        if self._ranks is not None and decision.clip is not None and not decision.clip.keeps_direction:
            # what is left of the norm of the whole is known at the next exchange
            self._clipped_by_value = row, decision, now.global_norm
            self._after = self._ranks.part_of_square(mine.measure(scale))
        else:
            judge.done(row, decision, coefficient)

    def _row(
        self,
        step: int,
        source: Source,
        now: Measured,
        whole: Measured,
        sampled: Sample,
        rate: Floats | None,
        family: Family,
        returned: Any = None,
    ) -> Row:
        """Put together what was measured: ``whole`` before the user's clip, ``now`` as the optimizer sees it."""
        loss, loss_source = self.losses.read(returned)
        culprits, processes = None, 1
        if self._ranks is not None:
            loss, loss_source, culprits = self._unite(loss, loss_source, whole, now, sampled)
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
            family=family,
            applied=1.0 if whole is now else _share_left(now, whole),
            dead_share=sampled.dead_share,
            unchanged=sampled.unchanged,
            arrived=self.arrivals.arrived,
            culprits=culprits,
            provenance=self._provenance(source, whole is not now, loss_source, processes),
        )

    def _provenance(self, source: Source, before: bool, loss: LossSource, processes: int) -> Provenance:  # noqa: FBT001
        last = self._last_provenance
        if last[0] == source and before is (last[1] == "before the user's clip") and last[2] == loss:
            return last
        self._last_provenance = Provenance(source, self._seen_clip(before), loss, processes)
        return self._last_provenance

    def _seen_clip(self, before: bool) -> Clipped:  # noqa: FBT001
        if before:
            return "before the user's clip"
        return "no clip before it seen" if taps.USER_CLIP.installed else "as the optimizer sees it"

    # Gradients on a device: rows come later.

    def _send(
        self,
        now: Unread,
        source: Source,
        rate: Floats | None,
        family: Family,
        mine: Gradients | None,
        optimizer: Optimizer | None,
        returned: Any,
        before: Measured | Unread | None,
    ) -> None:
        """Send a row on its way; what must be done at once is decided on the device."""
        judge = self._judge()
        assert judge is not None
        later = self._require_later()
        before = before if isinstance(before, Unread) else None
        loss, loss_source = self.losses.unread(returned)
        facts = Facts(source, self._seen_clip(before is not None), loss_source, rate, family, self.arrivals.arrived)
        acts = mine is not None and source != "left out by the scaler" and self._clippable(source, optimizer)
        orders = judge.orders() if acts and self._may_act else None
        if orders is not None and orders.skip and mine is not None and not mine.skips(optimizer):
            judge.note(
                "on a device, gradients that are not finite are set to zero: of torch's optimizers only fused ones "
                "(fused=True) can leave a step out there."
            )
        clip = (orders.clip or orders.reserve) if orders is not None else None
        if orders is not None and clip is not None and type(clip).apply_unread is Clip.apply_unread:
            judge.note(f"{clip} has no apply_unread: it does not act on a device.")
            orders = replace(orders, clip=None, reserve=None)
        own = self.arrivals.own_norms()
        later.take(mine, now, before, facts, loss, optimizer, orders, own, closely=self._closely)

    def _require_later(self) -> Later:
        home = self._layers.home
        if self._later is None or self._later.home != home:
            self._read(wait=True)
            self._later = Later(self._layers, self._sampling, home, self._ranks)
        return self._later

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """Wait for the rows that are still under way; of several processes only at the end, for they decide in step.

        That the run is unstable is not raised here but at the next step.
        """
        if self._later is not None and (self._ranks is None or all_of_them):
            try:
                self._guarded(self._read, True)  # noqa: FBT003
            except TrainingUnstableError as stop:
                self._stop = stop

    def _read(self, wait: bool = False) -> None:  # noqa: FBT001, FBT002
        """Judge the rows that have come over from the device."""
        judge = self._judge()
        if self._later is None or judge is None:
            return
        for unnumbered, decision, numbers in self._later.rows(wait=wait):
            self._settle(numbers.after_norm)
            row = unnumbered._replace(step=self.step)
            self.step += 1
            judge.judge(row)
            if decision is NOTHING:
                continue
            if self._ranks is not None and decision.clip is not None and not decision.clip.keeps_direction:
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
        try:
            ranks = find_ranks(model, self._layers)
        except Unsupported as finding:
            judge.note(f"{finding}: numbers and verdict are those of this process alone.")
            return
        if ranks is None:
            return
        if not ranks.agree():
            self._may_act = False
            judge.note(
                f"only some of the {ranks.size} processes watch this model, so that numbers are those of this process alone "
                "and auto-clip does not act: call attach() in each of them."
            )
            return
        self._ranks = ranks
        if ranks.averages:
            self.arrivals.stand_sentinel()

    def _part_company(self) -> None:
        """From the first `model.join()` on some processes may have no more batches: each goes on by itself."""
        self.catch_up(all_of_them=True)
        self._ranks = self._later = self._clipped_by_value = None
        self._may_act = False
        judge = self._judge()
        if judge is not None:
            judge.note(
                "model.join() was used: from there on numbers are those of this process alone, and auto-clip does not act."
            )

    def _unite(
        self, loss: float, source: LossSource, whole: Measured, now: Measured, sampled: Sample
    ) -> tuple[float, LossSource, Culprits | None]:
        """Make the numbers those of all processes, in place."""
        assert self._ranks is not None
        bad = any(not math.isfinite(norm.item()) for norm in self.arrivals.own_norms())
        mine = Local(loss if source != "none" else None, bad, self._after)
        united = self._ranks.unite(mine, whole, now, sampled)
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

    def _fail(self, error: Exception) -> None:
        """Switch off; where others wait for this process's rows, tell them first, now or at the next step."""
        if self._ranks is None or isinstance(error, PeerError):
            self._give_up()
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
            self._give_up()
        elif device.reading_is_free(self._layers.home):
            ranks.tell_failure()
            self._give_up()
        elif self._later is not None and self._later.failure_is_known():
            self._give_up()
        else:
            self._require_later().tell_failure()

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
        if not self._may_act:
            return 1.0
        if decision.skip and optimizer is not None and source != "left out by the scaler":
            mine.hide(optimizer)
        elif decision.skip:
            mine.zero()
        elif decision.clip is not None and math.isfinite(now.global_norm) and self._clippable(source, optimizer):
            clip = decision.clip if scale == 1.0 else decision.clip.loosened(scale)
            return clip.apply(now.gradients, now.global_norm * scale)
        return 1.0

    def _clippable(self, source: Source, optimizer: Optimizer | None) -> bool:
        """False inside a line search: there the gradients belong to the search, and a clip would mislead it."""
        return source != "closure" or not isinstance(optimizer, torch.optim.LBFGS)

    def _guarded(self, do: Callable[..., Any], *args: Any) -> Any:
        """Run a part of gradwatch: its errors never reach the training loop, unless they are meant to."""
        if not self.active:
            return None
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003  as `torch.no_grad`, which costs ten times as much
        try:
            return do(*args)
        except TrainingUnstableError:
            raise
        except ExchangeError:
            self._give_up()
            raise
        except Exception as error:
            self._fail(error)
            return None
        finally:
            torch._C._set_grad_enabled(grad)
            self.seconds += perf_counter() - started


def _share_left(now: Measured, whole: Measured) -> float:
    """Return the norm after the user's clip over the norm before it."""
    if now is whole or not math.isfinite(whole.global_norm) or not 0 < now.global_norm < whole.global_norm:
        return 1.0
    return now.global_norm / whole.global_norm


def _fused_scale(optimizer: Optimizer | None) -> float | None:
    """Return the loss scale that a fused optimizer still has to divide by; None when it will skip this step."""
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if overflow is not None and overflow.item() > 0:
        return None
    return 1.0 if scale is None else float(scale.item())
