"""The hooks and patches of one monitor, and the moments at which it acts: one row just before each update.

One process-wide pair of optimizer hooks serves all probes. The only other hooks are the post-accumulate hooks of
`gradwatch.probe.gradient_hooks` and two on the model's forward, of `gradwatch.forensics.capture`. Where torch has no hook it is
patched (`gradwatch.probe.patches`). The model is held weakly.
"""

from __future__ import annotations

import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from gradwatch import device
from gradwatch.errors import ExchangeError, TrainingUnstableError, UsageError
from gradwatch.measure.deepspeed import OFFLOADED
from gradwatch.measure.layers import facts_of, family_of, options_of
from gradwatch.measure.same_units import same_units
from gradwatch.measure.wrappers import unmeasurable
from gradwatch.probe import optimizer_hooks, patches
from gradwatch.probe.attribution import Attribution
from gradwatch.probe.deepspeed import DeepSpeed
from gradwatch.probe.fused_steps import FusedSteps
from gradwatch.probe.gradient_hooks import GradientHooks
from gradwatch.probe.loss_node import SeenLoss, seen_loss
from gradwatch.probe.loss_reader import LossReader
from gradwatch.probe.owners import Owners
from gradwatch.probe.peers import Peers
from gradwatch.probe.step_recorder import StepRecorder
from gradwatch.probe.turns import Turns
from gradwatch.probe.update_loop import UpdateLoop
from gradwatch.probe.user_clips import UserClips
from gradwatch.shutdown import Failure, all_done

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.measure.layers import Layers
    from gradwatch.probe.budget import Budget
    from gradwatch.probe.coming import Loss, Root
    from gradwatch.probe.gradients import Gradients
    from gradwatch.probe.investigator import Investigator
    from gradwatch.probe.judge import Judge
    from gradwatch.probe.patches import Run
    from gradwatch.records import OwnTime, Source

_LOOKED_AT = 8  # first backwards whose losses are looked at, each,
_LOOK_EVERY = 31  # and how often they are later: an odd number, for two that come by turns
_STEPS = torch.optim.Optimizer.profile_hook_step.__code__.co_filename  # where torch wraps each step


class Probe:
    """The hooks of one monitor.

    Args:
        layers: the watched parameters.
        judge: judges each row and decides what to do.
        pace: version and measuring interval, which processes that train together compare.
        every: number of optimizer steps between measurements, or a `Budget` that chooses it.
        scaler: the gradient scaler; None: it is found when it steps.
        own_time: counter of the time that watching takes.
        investigator: finds the operation that made the first non-finite number; None: nothing does.
    """

    def __init__(
        self,
        layers: Layers,
        judge: Judge,
        pace: dict[str, Any],
        every: int | Budget,
        scaler: torch.amp.GradScaler | None,
        own_time: OwnTime,
        investigator: Investigator | None = None,
    ) -> None:
        self._layers = layers
        self._judge = judge
        self._own_time = own_time
        self._loop = UpdateLoop(layers)
        self._fused = FusedSteps()
        self._left_out = self._left_out_before = 0
        self._stepping: weakref.ref[Optimizer] | None = None
        self.owners = Owners(layers, self._grow, self._find)
        self._deepspeed = DeepSpeed(self, layers, self.owners)
        self.gradient_hooks = GradientHooks(layers)
        self.attribution = Attribution(layers, self.owners, self.gradient_hooks, self._mistaken)
        self._investigator = investigator
        self.losses = LossReader(scaler)
        self._loss: SeenLoss | None = None
        self._told_of_copy = False
        peers = Peers(layers, judge, self.gradient_hooks, pace, looks=investigator is not None)
        self.recorder = StepRecorder(
            layers, judge, self.gradient_hooks, self.losses, peers, every, own_time, investigator
        )
        self._turns = Turns(self.owns_any, judge.losses_oppose)
        self._user_clips = UserClips(self.owners, self.attribution, self.recorder, self._loop, judge)
        self.active = False

    @property
    def seconds(self) -> float:
        """The time that watching has taken so far, in seconds."""
        return self._own_time.seconds

    # Life.

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Install all hooks and patches."""
        self.active = True
        if optimizer is not None:
            self.owners.find(optimizer)
        self.gradient_hooks.start()
        optimizer_hooks.listen(self)
        for patch in patches.ALL:
            patch.add(self)
        self._deepspeed.start()
        if self._investigator is not None:
            self._investigator.start()

    def stop(self) -> list[Failure]:
        """Remove all hooks and patches and restore what was hidden; return what failed.

        Each part is removed even if another one fails.
        """
        last = all_done([("the last rows", lambda: self.catch_up(all_of_them=True))])
        removals = [
            ("what sits on the model", lambda: all_done(self._parts())),
            ("the optimizers' hooks", lambda: optimizer_hooks.unlisten(self)),
        ]
        failures = all_done(removals)
        if failures:  # an interrupt may have come in the middle of a part; each can be repeated
            all_done(removals)
        return last + failures

    def _give_up(self) -> None:
        """Stop, but keep the process-wide hooks, over which torch may be iterating."""
        all_done(self._parts())

    def _parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        self.active = False
        yield "the hooks on parameters", self.gradient_hooks.stop
        for patch in patches.ALL:
            yield f"the patch of {patch.name}", lambda patch=patch: patch.remove(self)  # type: ignore[misc]
        yield "the patches of DeepSpeed", self._deepspeed.stop
        # a monitor that is kept for its summary must not keep the parameters alive
        yield "hidden gradients", self.owners.close
        yield "the losses", self.losses.forget
        yield "the rows", self.recorder.close
        if self._investigator is not None:
            yield "what is kept of the step", self._investigator.stop

    def owns_any(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer holds at least one watched parameter."""
        return self._loop.owns_any(optimizer)

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """Wait for the rows under way; with several processes only if ``all_of_them`` (see `StepRecorder.catch_up`)."""
        self._guarded(self.recorder.catch_up, all_of_them=all_of_them)

    # Called by the patches of torch (`gradwatch.probe.patches.Listener`).

    def failed(self, error: Exception) -> None:
        """Handle an error of a call by a patch or hook: raise it if it is meant for the training loop, or if strict.

        `TrainingUnstableError` and `ExchangeError` are meant for it; any other error switches the probe off.
        """
        if isinstance(error, (TrainingUnstableError, ExchangeError)):
            raise error
        self.recorder.fail(error)
        self._leave_if_over()

    def backward_begins(self, run: Run) -> None:
        """Note the gradients that exist before a backward, and what is needed to find an operation in it."""
        started = perf_counter()
        self.attribution.begins(run)
        if self._investigator is not None:
            self._investigator.backward_begins(run.roots, run.losses)
        self._own_time.seconds += perf_counter() - started

    def backward_failed(self) -> None:
        """Discard what arrived in a backward that raised."""
        self.gradient_hooks.failed()

    def backward_ended(self, run: Run) -> None:
        """Record the losses of a backward that has ended, and make a row if no optimizer step is going to follow."""
        started, before = perf_counter(), self._own_time.seconds
        if self._investigator is not None and self._investigator.watching:
            self._investigator.backward_ended()
        if self._turns.watches:
            self._guarded(self._turns.backward_ended, run.roots)
        if self.attribution.end(run, fused=bool(self._fused.parts)):
            if (done := self.attribution.backwards) <= _LOOKED_AT or done % _LOOK_EVERY == 0:
                self._guarded(self._look_at_loss, run.roots)
            if self.gradient_hooks.came and not run.inside:
                self.gradient_hooks.end()
            if self.losses.given:
                self.losses.backward_came()
            if self._fused.parts:
                self._guarded(self._end_of_fused_backward, run.losses)
            elif self._loop.kind != "optimizer":
                self._guarded(self._end_of_backward)
        self._own_time.seconds = before + perf_counter() - started  # what was called here has counted itself

    def _look_at_loss(self, roots: Any) -> None:
        seen, known = seen_loss(roots), self._loss
        if known is None:
            self._loss = seen
            self._judge.loss_found(seen.kind, seen.prediction, seen.behind, mean=seen.mean)
        elif (
            known.kind and seen.told != known.told
        ):  # losses of several kinds, or among ever more classes, have no scale
            self._loss = SeenLoss()
            self._judge.loss_found(known.kind, (), "more", mean=False)

    def _end_of_backward(self) -> None:
        if self._loop.backward_ended():
            self._finds_strangers()
            self._take(self.owners.everything(), "end of backward")

    def user_clips(self, gradients: Sequence[Tensor]) -> None:
        """Measure the gradients that the user is about to clip, which cannot be measured unclipped later."""
        if gradients and self.recorder.needs_norms_before_clip:
            self._guarded(self._user_clips.begins, gradients)

    def own_clip_begins(self) -> None:
        """Measure all gradients, which code of the user is about to clip."""
        given = (parameter.grad for _, parameter in self._layers.measured())
        self.user_clips([gradient for gradient in given if gradient is not None])

    def user_norms(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """Return the total norm of gradients that the user is about to clip; None if torch has to compute it."""
        if not self.recorder.has_fast_path or not isinstance(gradients, list):
            return None
        total: Tensor | None = self._guarded(self._user_clips.total_of, gradients)
        return total

    def user_scales(self, total: Tensor, max_norm: float) -> None:
        """Record that the user has clipped gradients of the norm ``total`` to ``max_norm``."""
        self._guarded(self._user_clips.ends, total, max_norm)

    def user_clips_nothing(self, parameters: Sequence[Tensor]) -> None:
        """Record that the user has clipped parameters without any gradient."""
        self._guarded(self._user_clips.found_nothing, parameters)

    def scaler_unscales(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Divide the norms before the user's clip by the loss scale if that clip came before the scaler has done so."""
        mine = self._guarded(self.owners.stepping, optimizer)
        if mine is not None and mine.coming.before_clip is not None:
            self._guarded(self._user_clips.unscaled, mine, scaler._get_scale_async())

    def scaler_steps(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Record the gradient scaler of the coming step of an optimizer."""
        if self._guarded(self.owners.stepping, optimizer) is not None:
            self.losses.scaled_by(scaler)
            self._left_out_before = self._left_out
            self._left_out += 1

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """Record whether the scaler left the step out. Single ones are part of its search for a scale, many in a row a fault."""
        mine = self._guarded(self.owners.stepping, optimizer)
        if mine is not None and self._left_out > self._left_out_before:
            # other processes may make this step and wait for the row
            if self._left_out >= self.losses.patience(found=mine.steps > 0) or self._guarded(self.recorder.meet_peers):
                self._guarded(self._take, mine, "left out by the scaler", optimizer)
            self._used(mine)
            self._step_over(None)
        self.losses.scaled_by(None)

    # The optimizer's hooks.

    def captured(self, optimizer: Optimizer | None = None) -> None:
        """Report that a step of an optimizer that this probe watches is captured into a CUDA graph.

        A graph replays it without calling hooks.
        """
        if optimizer is None or self.owns_any(optimizer):
            self._judge.note("a step that is captured into a CUDA graph is not watched, nor are its replays.")

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Measure the gradients that the optimizer is about to use; return new arguments if it has a closure, else None."""
        if self._turns.watches:
            self._guarded(self._turns.stepped, optimizer)
        plain = not kwargs and (len(args) == 1 or args[1:] == (None,))  # without a closure
        if plain and self.attribution.clearing.watches:
            self._guarded(self._look_at_clearing, optimizer)
        if plain and self._take_fast_path(optimizer):
            return None
        return self._guarded(self._prepare, optimizer, args, kwargs)

    def _look_at_clearing(self, optimizer: Optimizer) -> None:
        mine = self.owners.known(optimizer)
        if mine is not None and self._loop.kind == "optimizer":
            self.attribution.clearing.comes(mine)

    def before_step_without_hook(self, optimizer: Any) -> None:
        """Measure the gradients that an optimizer without torch's hooks is about to use."""
        self._guarded(self._prepare, optimizer, (optimizer,), {})

    def _take_fast_path(self, optimizer: Optimizer) -> bool:
        """Record a step on the fast path; return False if it is unusual in any way and has to be prepared as usual."""
        if (
            self._stepping is not None
            or self._loop.kind != "optimizer"
            or self.gradient_hooks.came
            or torch._C._current_graph_task_id() != -1
        ):
            return False
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003
        try:
            if not self.recorder.take_fast_path(optimizer):
                return False
            self.recorder.skipping.comes(optimizer, self.attribution.backwards)
            self.recorder.skipping.made()
        except Exception:
            return False  # the usual path fails in the same place, and reports it
        finally:
            torch._C._set_grad_enabled(grad)
            self._own_time.seconds += perf_counter() - started
        self._stepping = weakref.ref(optimizer)
        self._left_out = 0
        return True

    def _prepare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self.recorder.peers.expect_row()
        changed = self._prepare_step(optimizer, args, kwargs)
        self.recorder.peers.row_made()
        return changed

    def _take(self, mine: Gradients, source: Source, optimizer: Optimizer | None = None, returned: Any = None) -> None:
        if mine.coming.before_clip is not None:
            self._user_clips.unscaled(mine, getattr(optimizer, "grad_scale", None))
        if self.recorder.take(mine, source, optimizer, returned) and source != "left out by the scaler":
            self._left_out = 0
        if mine.outer is not None:
            self.recorder.skipping.inner_comes(mine.outer)
        self._used(mine)
        if self._loop.kind != "optimizer":
            self._step_over(None)

    def _step_over(self, optimizer: Optimizer | None) -> None:
        if self._investigator is not None:
            self._investigator.step_over(optimizer)

    def _used(self, mine: Gradients) -> None:
        self.losses.used(mine.coming)
        self.owners.used(mine)

    def _prepare_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        mine = self.owners.get(optimizer)
        # an optimizer of other parameters steps after a backward of this model
        if mine is None:
            vain = self._loop.stepped_in_vain(self.attribution.backwards, self.recorder.skipping.backwards)
            if vain and not self._told_of_copy and self._layers.have_shapes_of(optimizer):
                self._told_of_copy = True
                self._judge.mistake(
                    f"since step {self.recorder.step}, only an optimizer of other parameters has stepped, although "
                    "backward passes reach the model: it may hold a copy. Build it from model.parameters(), and train that."
                )
            if self._deepspeed.appears():
                self._meet_deepspeed()
        if mine is None or self._is_inside_another(optimizer):
            return None
        mine.restore(late=True)
        if self.owners.leave_to_another(mine):
            self.recorder.skipping.expect(mine)
            return None
        self._stepping = weakref.ref(optimizer)
        if torch._C._current_graph_task_id() != -1:  # fused into backward: one step for each parameter
            self._step_inside_backward(mine, optimizer)
            return None
        if self.gradient_hooks.came:  # from a backward that did not go through the patch
            self.gradient_hooks.end()
            self.attribution.passed_by()
        if self._finds_strangers():
            mine = self.owners.get(optimizer)
            if mine is None:
                self._stepping = None
                return None
        self.recorder.skipping.comes(optimizer, self.attribution.backwards)
        self._loop.optimizer_steps()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            if self._loop.kind == "optimizer":
                self._take(mine, "optimizer step", optimizer)
            return None
        self.recorder.skipping.expect_closure(mine)
        wrapped = self._wrap(closure, optimizer)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _finds_strangers(self) -> bool:
        """Watch parameters that were added or replaced by now, if it is time to look; return whether there are any."""
        if not self.recorder.looks_at_model or not self._layers.has_strangers:
            return False
        self.owners.look_again()
        return True

    def _meet_deepspeed(self) -> None:
        self.recorder.grow(set(range(len(self._layers))))
        self.gradient_hooks.grow()
        for owner in self.owners.current():  # the step under way was not seen to begin
            self._used(owner)
        zero = self._layers.zero
        if zero is not None and zero.offloads and self._judge.policy is not None:
            self._judge.disarm(f"{OFFLOADED}, so that auto-clip does not act.")

    def _is_inside_another(self, optimizer: Optimizer) -> bool:
        """Return whether this step is part of another one under way, by `super().step()` or by a wrapper."""
        outer = self._stepping() if self._stepping is not None else None
        # a step that raised has never ended, so look for one that is still on the stack
        return outer is not None and _steps_under_way(outer) > (outer is optimizer)

    def _step_inside_backward(self, mine: Gradients, optimizer: Optimizer) -> None:
        self._loop.optimizer_steps()
        part = mine.measure_at(self._layers.home)
        if self._fused.has_seen(part):  # that backward did not go through the patch, so its end was not seen
            self._end_of_fused_backward()
        self._fused.add(part, mine, optimizer)
        self.recorder.report_left_out(mine)

    def _end_of_fused_backward(self, losses: list[Loss] | None = None) -> None:
        everything = self.owners.everything()
        everything.coming.add(losses or [])
        self.recorder.take_parts(self._fused.end(), self._fused.family, everything)
        self._used(everything)

    def after_step(self, optimizer: Optimizer) -> None:
        """Restore the gradients and settings that were changed for this step of the optimizer."""
        started = perf_counter()
        mine = self.owners.known(optimizer)
        if mine is not None and mine.parameters:
            mine.restore()
            if self.attribution.clearing.watches:
                self.attribution.clearing.stepped(mine)
            if self._user_clips.early:
                self._user_clips.stepped(mine)
            if mine.around is not None:
                self.owners.step_is_over(mine)
            self.recorder.skipping.over()
            if self._stepping is not None and self._stepping() is optimizer:
                self._stepping = None
            self._own_time.seconds += perf_counter() - started
            if self._investigator is not None:  # frees the graph of the program, which would be freed without it too
                self._investigator.step_over(optimizer)

    def _wrap(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        evaluations = 0

        def wrapped() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations == 1:
                self._guarded(self._evaluates, optimizer)
            with torch.enable_grad():
                loss = closure()
            if self._loop.kind == "optimizer":
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
        self.recorder.skipping.count_backwards(self.attribution.backwards)
        if evaluations == 1:
            self._take(mine, "closure", optimizer, loss)
        else:  # a line search evaluates several times for one step
            self._used(mine)
        self.recorder.skipping.closure_evaluated(mine, evaluations)

    def explicit_step(self) -> None:
        """Make a row now, because the user says that the update is about to happen."""
        if device.capturing():
            self.captured()
            return
        self._loop.user_steps()
        self._guarded(self._take_everything)

    def _take_everything(self) -> None:
        self._finds_strangers()
        self._take(self.owners.everything(), "monitor.step()")

    def _find(self, optimizer: Optimizer) -> None:
        """Record an optimizer that owns watched layers; raise `UsageError` if it cannot be watched."""
        self._loop.optimizer_found()
        self._turns.again()
        zero = self._layers.zero
        named = zero.inner if zero is not None and optimizer is zero.optimizer else optimizer
        self._judge.optimizer_found(type(named).__name__, family_of(named), options_of(named))
        grows = [group["weight_decay"] for group in optimizer.param_groups if _is_negative(group.get("weight_decay"))]
        if grows:
            self._judge.mistake(
                f"the weight decay of a parameter group is {grows[0]:g}: below zero it makes weights grow. Set it to 0 or more."
            )
        if alike := same_units(self._layers):
            self._judge.mistake(alike)
        if self._judge.policy is not None and isinstance(optimizer, torch.optim.LBFGS):
            self._judge.note("auto-clip does not clip inside a line search, such as that of LBFGS.")
        reason = unmeasurable(optimizer=optimizer)
        if reason is not None:
            raise UsageError(f"{type(optimizer).__name__} cannot be watched: {reason}.")

    def _mistaken(self, text: str) -> None:
        self._guarded(self._judge.mistake, text)

    def _grow(self, news: set[int]) -> list[Root]:
        """Watch parameters that were added or replaced; return the losses of the backwards that have reached them."""
        self.recorder.grow(news)
        self.gradient_hooks.grow()
        model = self._layers.model
        if model is not None:
            self._judge.grown(self._layers, facts_of(model, self._layers, None))
        return self.attribution.found()

    def _guarded(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``do`` and return its result; errors do not reach the training loop, unless meant for it or strict."""
        if not self.active:
            return None
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003  as `torch.no_grad`, which costs ten times as much
        try:
            return do(*args, **kwargs)
        except TrainingUnstableError:
            self._stepping = None  # if the user goes on all the same, the next step is judged again
            raise
        except ExchangeError:
            self._give_up()
            raise
        except Exception as error:
            self.recorder.fail(error)
            return None
        finally:
            torch._C._set_grad_enabled(grad)
            self._own_time.seconds += perf_counter() - started
            if self.recorder.over:
                self._leave_if_over()

    def _leave_if_over(self) -> None:
        if self.recorder.over and self.active:
            self._give_up()


def _is_negative(setting: Any) -> bool:
    return isinstance(setting, (int, float)) and setting < 0


def _steps_under_way(optimizer: Optimizer) -> int:
    """Return how many calls of an optimizer's step are on the stack, including the current one."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _STEPS and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back
    return count
