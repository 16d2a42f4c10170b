"""What sits on the model and its optimizer, and when it acts: one row just before each update.

One process-wide pair of optimizer hooks serves all probes. With the post-accumulate hooks of
`gradwatch.probe.gradient_hooks` these are all the hooks there are. A probe knows the model weakly, so it never keeps it alive.
"""

from __future__ import annotations

import math
import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch

from gradwatch import device
from gradwatch.errors import ExchangeError, TrainingUnstableError, UsageError
from gradwatch.measure.norms import norm_of
from gradwatch.measure.readback import PATIENCE
from gradwatch.measure.wrappers import local_of, optimizers_alive, unmeasurable
from gradwatch.probe import optimizer_hooks as hooks
from gradwatch.probe import patches as taps
from gradwatch.probe.attribution import Attribution
from gradwatch.probe.backwards import losses_of
from gradwatch.probe.budget import Budget
from gradwatch.probe.gradient_hooks import GradientHooks
from gradwatch.probe.loss_source import LossReader
from gradwatch.probe.owners import Owners
from gradwatch.probe.step_recorder import StepRecorder
from gradwatch.shutdown import Failure, all_done

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.readback import Unread
    from gradwatch.probe.coming import Loss, Root
    from gradwatch.probe.fast_path import FastPath
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.patches import Run
    from gradwatch.records import Family, Floats, Source

_STEPS = torch.optim.Optimizer.profile_hook_step.__code__.co_filename  # where torch wraps each step
_UNDECIDED = 16  # steps of optimizers that own no watched layer after which a loop is taken to have none of its own


class Probe:
    """The hooks of one monitor.

    Args:
        layers: the watched parameters.
        judge: told of every row; held weakly.
        every: optimizer steps between measurements; a `Budget` chooses them.
        scaler: the gradient scaler; None: found when it steps.
    """

    def __init__(
        self, layers: Layers, judge: Judge, every: int | Budget = 1, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self._layers = layers
        self._judge = weakref.ref(judge)
        self._has_optimizer = False
        self._loop: Literal["unknown", "optimizer", "backward", "explicit"] = "unknown"
        self._vain_steps = self._vain_at = self._moves = 0
        self._awaited = False
        self._left_out = self._left_out_before = 0
        self._weights_then = math.nan
        self._inside: list[tuple[Measured | Unread, Floats]] = []
        self._inside_seen: set[int] = set()
        self._inside_family: Family = "other"
        self._strange = 0  # gradients in the user's clip that are none of the model's
        self._stepping: weakref.ref[Optimizer] | None = None
        self.owners = Owners(layers, self._grow, self._find)
        self.arrivals = GradientHooks(layers)
        self.attribution = Attribution(layers, self.owners, self.arrivals)
        self.backward_begins = self.attribution.begins  # see `patches.Listener`
        self.losses = LossReader(scaler)
        self._budget = every if isinstance(every, Budget) else None
        self.rows = StepRecorder(layers, judge, self.arrivals, self.losses, every if isinstance(every, int) else 1)
        self.active = False
        self.seconds = 0.0

    # Life.

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Put every hook in place."""
        self.active = True
        if optimizer is not None:
            self.owners.find(optimizer)
        self.arrivals.start()
        hooks.listen(self)
        for tap in taps.ALL:
            tap.add(self)

    def stop(self) -> list[Failure]:
        """Remove every hook and give back what was hidden, each whatever becomes of the others; return what failed."""
        last = all_done([("the last rows", lambda: self.catch_up(all_of_them=True))])
        removals = [
            ("what sits on the model", lambda: all_done(self._parts())),
            ("the optimizers' hooks", lambda: hooks.unlisten(self)),
        ]
        failures = all_done(removals)
        if failures:  # an interrupt may have come in the middle of a part; each can be done twice
            all_done(removals)
        return last + failures

    def _give_up(self) -> None:
        """Stop, but for the process-wide hooks: torch may be walking over them right now."""
        all_done(self._parts())

    def _parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        self.active = False
        yield "the hooks on parameters", self.arrivals.stop
        for tap in taps.ALL:
            yield f"the tap on {tap.name}", lambda tap=tap: tap.remove(self)  # type: ignore[misc]
        yield (
            "hidden gradients",
            self.owners.close,
        )  # a monitor that is kept for its summary shall not keep the parameters
        yield "the losses", self.losses.forget
        yield "the rows", self.rows.close

    def owns_any(self, optimizer: Optimizer) -> bool:
        """True when the optimizer holds at least one watched parameter."""
        return any(self._layers.column(p) is not None for group in optimizer.param_groups for p in group["params"])

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """See `StepRecorder.catch_up`."""
        self._guarded(self.rows.catch_up, all_of_them=all_of_them)

    def watch_closely(self, *, closely: bool) -> None:
        """Follow the order of arrival and sample the weights on each step, while an incident is open."""
        self.rows.closely = closely
        self.arrivals.follow(closely=closely)

    # The taps.

    def failed(self, error: Exception) -> None:
        """See `patches.Listener`: `TrainingUnstableError` and `ExchangeError` are meant, and any other one when strict."""
        if isinstance(error, (TrainingUnstableError, ExchangeError)):
            raise error
        self.rows.fail(error)
        self._leave_if_over()

    def backward_failed(self) -> None:
        """See `patches.Listener`."""
        self.arrivals.failed()

    def backward_ended(self, run: Run) -> None:
        """See `patches.Listener`."""
        started = perf_counter()
        if self.attribution.ended(run, fused=bool(self._inside)):
            if self.arrivals.came and not run.inside:
                self.arrivals.end()
            if self.losses.given:
                self.losses.backward_came()
            if self._inside:
                self._guarded(self._end_of_fused_backward, losses_of(run.roots))
            elif self._loop != "optimizer":
                self._guarded(self._end_of_backward)
        self.seconds += perf_counter() - started

    def _end_of_backward(self) -> None:
        """In a loop without a torch optimizer, the end of backward is the last moment before the update."""
        if self._loop == "explicit" or self._has_optimizer:
            return
        if self._loop == "unknown" and not self._updates_without_optimizer():
            return
        self._loop = "backward"
        self._take(self.owners.everything(), "end of backward")

    def _updates_without_optimizer(self) -> bool:
        """True when the weights moved although there is no optimizer of theirs, or another one keeps stepping in vain."""
        parameters = [parameter for _, parameter in self._layers.measured()]
        if all(device.reading_is_free(parameter.device) for parameter in parameters):
            now = sum(norm_of(parameter) for parameter in parameters)
        else:  # torch counts the changes in place of each tensor
            now = float(sum(local_of(parameter)._version for parameter in parameters))
        then, self._weights_then = self._weights_then, now
        if self._vain_steps >= _UNDECIDED:
            return True
        if math.isnan(then) or now == then:
            return False
        self._moves += 1
        if self._moves == 1 and any(self.owns_any(optimizer) for optimizer in optimizers_alive()):
            self._awaited = True  # SAM moves the weights before its first step
        return not self._awaited or self._moves > _UNDECIDED

    def user_clips(self, gradients: Sequence[Tensor]) -> None:
        """See `patches.Listener`: the user's first clip of a step is the last moment to see the gradients whole."""
        quiet = self.rows.quiet
        if gradients and (quiet is None or not (quiet.resting or quiet.shared)):
            self._guarded(self._see_clip, set(map(id, gradients)))

    def _see_clip(self, clipped: set[int]) -> None:
        if self.attribution.is_elsewhere():
            return
        self.owners.look_at_optimizers()
        strange = self._strangers(clipped)
        if (
            strange and strange != self._strange
        ):  # they may be of layers that have just come, or are trained from now on
            self.owners.look_again()
            self.owners.look_at_the_rest()
            self._strange = self._strangers(clipped)
        for owner in self.owners.current():
            if any(id(parameter.grad) in clipped for parameter in owner.parameters):
                self.rows.measure_before_clip(owner)

    def _strangers(self, clipped: set[int]) -> int:
        return len(clipped - {id(one.grad) for owner in self.owners.current() for one in owner.parameters})

    def user_norms(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """See `patches.Listener`."""
        quiet = self.rows.quiet
        if quiet is None or not isinstance(gradients, list):
            return None
        total: Tensor | None = self._guarded(self._share, quiet, gradients)
        return total

    def _share(self, quiet: FastPath, gradients: list[Tensor]) -> Tensor | None:
        return None if self.attribution.is_elsewhere() else quiet.share(gradients)

    def user_scales(self, total: Tensor, max_norm: float) -> None:
        """See `patches.Listener`."""
        if self.rows.quiet is not None:
            self._guarded(self.rows.quiet.scaled, total, max_norm)
        for owner in self.owners.current():
            if owner.coming.before_clip is not None:
                owner.coming.before_clip.ended()

    def scaler_steps(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """See `patches.Listener`."""
        if self._guarded(self.owners.stepping, optimizer) is not None:
            self.losses.scaler = scaler
            self._left_out_before = self._left_out
            self._left_out += 1

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """See `patches.Listener`: now and then a step is left out to find the scale; many in a row are a fault."""
        mine = self._guarded(self.owners.stepping, optimizer)
        if mine is not None and self._left_out > self._left_out_before:
            if self._left_out >= PATIENCE or self._guarded(
                self.rows.together
            ):  # others may make this step, and wait for the row
                self._guarded(self._take, mine, "left out by the scaler", optimizer)
            self._used(mine)
        self.losses.scaler = None

    # The optimizer's hooks.

    def captured(self) -> None:
        """A step is captured into a CUDA graph, which replays it without asking anybody."""
        judge = self._judge()
        if judge is not None:
            judge.note("a step that is captured into a CUDA graph is not watched, nor are its replays.")

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Measure what the optimizer is about to use; return new arguments when it has a closure."""
        quiet = self.rows.quiet
        if quiet is not None and len(args) == 1 and not kwargs and self._passes(quiet, optimizer):
            return None
        return self._guarded(self._prepare, optimizer, args, kwargs)

    def _passes(self, quiet: FastPath, optimizer: Optimizer) -> bool:
        """True when the step went the short way; one that is unusual in any way goes the long one from its beginning."""
        if (
            self._stepping is not None
            or self._loop != "optimizer"
            or self.arrivals.came
            or torch._C._current_graph_task_id() != -1
        ):
            return False
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003
        try:
            if not self.rows.pass_quietly(optimizer):
                return False
            self.rows.skipping.comes(optimizer, self.attribution.backwards)
            self.rows.skipping.made()
        except Exception:
            return False  # the long way fails in the same place, and tells
        finally:
            torch._C._set_grad_enabled(grad)
            self.seconds += perf_counter() - started
        self._stepping = quiet.optimizer
        self._left_out = 0
        return True

    def _prepare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.rows.expect()
        changed = self._prepare_step(optimizer, args, kwargs)
        self.rows.expected()
        return changed

    def _take(self, mine: Gradients, source: Source, optimizer: Optimizer | None = None, returned: Any = None) -> None:
        if self._budget is not None:
            self.rows.wish = self._budget.every(self.seconds, self.rows.step, self.rows.made)
        if self.rows.take(mine, source, optimizer, returned) and source != "left out by the scaler":
            self._left_out = 0
        if mine.outer is not None:
            self.rows.skipping.inner_comes(mine.outer)
        self._used(mine)

    def _used(self, mine: Gradients) -> None:
        self.losses.used(mine.coming)
        self.owners.used(mine)

    def _prepare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        mine = self.owners.get(optimizer)
        # another optimizer steps after a backward of this model
        if mine is None and self.attribution.backwards > self._vain_at:
            self._vain_steps, self._vain_at = self._vain_steps + 1, self.attribution.backwards
        if mine is None or self._is_inside_another(optimizer):
            return None
        mine.restore(late=True)
        if self.owners.waits_for_another(mine):
            self.rows.skipping.expect(mine)
            return None
        self._stepping = weakref.ref(optimizer)
        if torch._C._current_graph_task_id() != -1:  # fused into backward: one step for each parameter
            self._step_inside_backward(mine, optimizer)
            return None
        if self.arrivals.came:  # a backward that passed by the tap
            self.arrivals.end()
            self.attribution.passed_by()
        self.rows.skipping.comes(optimizer, self.attribution.backwards)
        if self._loop != "explicit":
            self._loop = "optimizer"
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            if self._loop == "optimizer":
                self._take(mine, "optimizer step", optimizer)
            return None
        self.rows.skipping.expect_closure(mine)
        wrapped = self._wrap(closure, optimizer)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _is_inside_another(self, optimizer: Optimizer) -> bool:
        """True for a step inside another's step, by `super().step()` or by a wrapper: it belongs to that one."""
        outer = self._stepping() if self._stepping is not None else None
        # a step that raised never came to its end, so that it must be looked for
        return outer is not None and _steps_under_way(outer) > (outer is optimizer)

    def _step_inside_backward(self, mine: Gradients, optimizer: Optimizer) -> None:
        self._loop = "optimizer"
        home = self._layers.home
        part = mine.measure() if device.reading_is_free(home) else mine.measure_unread(home)
        columns = part.columns.tolist()
        if not self._inside_seen.isdisjoint(columns):  # the end of that backward passed by the tap
            self._end_of_fused_backward()
        self._inside_seen.update(columns)
        self._inside.append((part, mine.rate(optimizer)))
        self.rows.tell_left_out(mine)
        self._inside_family = mine.family

    def _end_of_fused_backward(self, losses: list[Loss] | None = None) -> None:
        parts, self._inside = self._inside, []
        self._inside_seen.clear()
        everything = self.owners.everything()
        everything.coming.add([(loss, None) for loss in losses or []])
        self.rows.take_parts(parts, self._inside_family, everything)
        self._used(everything)

    def after_step(self, optimizer: Optimizer) -> None:
        """Give back the gradients that were hidden so that the optimizer skipped them."""
        mine = self.owners.known(optimizer)
        if mine is not None and mine.parameters:
            mine.restore()
            self.owners.step_is_over(mine)
            self.rows.skipping.over()
            if self._stepping is not None and self._stepping() is optimizer:
                self._stepping = None

    def _wrap(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        evaluations = 0

        def wrapped() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations == 1:
                self._guarded(self._evaluates, optimizer)
            with torch.enable_grad():
                loss = closure()
            if self._loop == "optimizer":
                self._guarded(self._evaluated, optimizer, loss, evaluations)
            return loss

        return wrapped

    def _evaluates(self, optimizer: Optimizer) -> None:
        mine = self.owners.get(optimizer)
        if mine is not None:
            mine.coming.evaluate()

    def _evaluated(self, optimizer: Optimizer, loss: Any, evaluations: int) -> None:
        mine = self.owners.get(optimizer)
        if mine is None:
            return
        self.rows.skipping.backwards = self.attribution.backwards
        if evaluations == 1:
            self._take(mine, "closure", optimizer, loss)
        else:  # a line search evaluates several times for one step
            self._used(mine)
        self.rows.skipping.closure_evaluated(mine, evaluations)

    def explicit_step(self) -> None:
        """The user says that the update is about to happen."""
        self._loop = "explicit"
        self._guarded(self._take_everything)

    def _take_everything(self) -> None:
        self._take(self.owners.everything(), "monitor.step()")

    def _find(self, optimizer: Optimizer) -> None:
        """An optimizer has been found that owns watched layers."""
        judge = self._judge()
        if judge is None:
            return
        self._has_optimizer = True
        judge.optimizer_found(optimizer)
        reason = unmeasurable(optimizer=optimizer)
        if reason is not None:
            raise UsageError(f"{type(optimizer).__name__} cannot be watched: {reason}.")

    def _grow(self, news: set[int]) -> list[Root]:
        """Follow parameters that were added or replaced; return what backwards through them began from."""
        self.rows.grow(news)
        self.arrivals.grow()
        judge = self._judge()
        if judge is not None:
            judge.grown(self._layers)
        return self.attribution.found()

    def _guarded(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a part of gradwatch: its errors never reach the training loop, unless they are meant to."""
        if not self.active:
            return None
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003  as `torch.no_grad`, which costs ten times as much
        try:
            return do(*args, **kwargs)
        except TrainingUnstableError:
            self._stepping = None  # a user who steps again all the same is judged again
            raise
        except ExchangeError:
            self._give_up()
            raise
        except Exception as error:
            self.rows.fail(error)
            return None
        finally:
            torch._C._set_grad_enabled(grad)
            self.seconds += perf_counter() - started
            if self.rows.over:
                self._leave_if_over()

    def _leave_if_over(self) -> None:
        if self.rows.over and self.active:
            self._give_up()


def _steps_under_way(optimizer: Optimizer) -> int:
    """Return how many calls of an optimizer's step are under way; of one that steps now, this one is among them."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _STEPS and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count
