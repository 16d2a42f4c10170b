"""What sits on the model and its optimizer, and when it acts: one row just before each update.

One process-wide pair of optimizer hooks serves all probes. With the post-accumulate hooks of `gradwatch.arrivals` these
are all the hooks there are. A probe knows the model weakly, so it never keeps it alive.
"""

from __future__ import annotations

import itertools
import math
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch

from gradwatch import device, hooks, taps
from gradwatch.arrivals import Arrivals
from gradwatch.budget import Budget
from gradwatch.errors import ExchangeError, TrainingUnstableError, UsageError
from gradwatch.gradients import Gradients
from gradwatch.losses import Losses
from gradwatch.measure import norm_of
from gradwatch.parts import Failure, all_done
from gradwatch.rows import Rows
from gradwatch.wrappers import local_of, unmeasurable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from gradwatch.device import Unread
    from gradwatch.gradients import Measured
    from gradwatch.layers import Layers
    from gradwatch.quiet import Quiet
    from gradwatch.records import Family, Floats, Source
    from gradwatch.rows import Judge

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
        self._known: dict[int, Gradients] = {}  # by the optimizer's id
        self._numbers: dict[int, int] = {}  # by the same, as long as it lives
        self._found = itertools.count()
        self._gone: dict[int, weakref.ref[Optimizer]] = {}  # forget them when it is; nothing stays on it after detach
        self._owners = False
        self._all: Gradients | None = None
        self._loop: Literal["unknown", "optimizer", "backward", "explicit"] = "unknown"
        self._vain_steps = self._vain_at = 0
        self._backwards_then = 0
        self._left_out = self._left_out_before = 0
        self._weights_then = math.nan
        self._inside: list[tuple[Measured | Unread, Floats]] = []
        self._inside_seen: set[int] = set()
        self._inside_family: Family = "other"
        self._stray: Tensor | None = None
        self._stepping: weakref.ref[Optimizer] | None = None
        self._stepping_at = -1
        self.arrivals = Arrivals(layers)
        self.losses = Losses(scaler)
        self._budget = every if isinstance(every, Budget) else None
        self.rows = Rows(layers, judge, self.arrivals, self.losses, every if isinstance(every, int) else 1)
        self.active = False
        self.backwards = 0
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

    def stop(self) -> list[Failure]:
        """Remove every hook and give back what was hidden, each whatever becomes of the others; return what failed."""
        return [
            *all_done([("the last rows", lambda: self.catch_up(all_of_them=True))]),
            *all_done(self._parts()),
            *all_done([("the optimizers' hooks", lambda: hooks.unlisten(self))]),
        ]

    def _give_up(self) -> None:
        """Stop, but for the process-wide hooks: torch may be walking over them right now."""
        all_done(self._parts())

    def _parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        self.active = False
        yield "the hooks on parameters", self.arrivals.stop
        for tap in taps.ALL:
            yield f"the tap on {tap.name}", lambda tap=tap: tap.remove(self)  # type: ignore[misc]
        for gradients in tuple(self._known.values()):
            yield "hidden gradients", gradients.restore
        self._known.clear()  # a monitor that is kept for its summary shall not keep the parameters
        self._gone.clear()
        self._all = None
        yield "the rows", self.rows.close

    def owns_any(self, optimizer: Optimizer) -> bool:
        """True when the optimizer holds at least one watched parameter."""
        return any(self._layers.column(p) is not None for group in optimizer.param_groups for p in group["params"])

    def catch_up(self, *, all_of_them: bool = False) -> None:
        """See `Rows.catch_up`."""
        self._guarded(self.rows.catch_up, all_of_them=all_of_them)

    def watch_closely(self, *, closely: bool) -> None:
        """Follow the order of arrival and sample the weights on each step, while an incident is open."""
        self.rows.closely = closely
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
        self.rows.forget_clip()  # what was clipped before this backward was not stepped with
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
        self._take(self._everything(), "end of backward")

    def _updates_without_optimizer(self) -> bool:
        """True when the weights moved although no optimizer of theirs stepped, or another one keeps stepping in vain."""
        parameters = [parameter for _, parameter in self._layers.measured()]
        if all(device.reading_is_free(parameter.device) for parameter in parameters):
            now = sum(norm_of(parameter) for parameter in parameters)
        else:  # torch counts the changes in place of each tensor
            now = float(sum(local_of(parameter)._version for parameter in parameters))
        then, self._weights_then = self._weights_then, now
        moved = not math.isnan(then) and self._weights_then != then
        return moved or self._vain_steps >= _UNDECIDED

    def user_clips(self, gradients: Sequence[Tensor]) -> None:
        """See `taps.Listener`: the user's first clip of a step is the last moment to see the gradients whole."""
        resting = self.rows.quiet is not None and self.rows.quiet.resting
        if resting or self.rows.seen_before_clip or not gradients:
            return
        mine = self._everything()
        if any(parameter.grad is gradients[0] for parameter in mine.parameters):
            self._guarded(self.rows.measure_before_clip, mine)

    def user_norms(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """See `taps.Listener`."""
        quiet = self.rows.quiet
        if quiet is None or self.rows.seen_before_clip or not isinstance(gradients, list):
            return None
        total: Tensor | None = self._guarded(quiet.share, gradients)
        return total

    def user_scales(self, total: Tensor, max_norm: float) -> None:
        """See `taps.Listener`."""
        if self.rows.quiet is not None:
            self._guarded(self.rows.quiet.scaled, total, max_norm)

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
            if self._left_out >= device.PATIENCE or self._guarded(
                self.rows.together
            ):  # others may make this step, and wait for the row
                self._guarded(self._take, mine, "left out by the scaler", optimizer)
            self.losses.forget()
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

    def _passes(self, quiet: Quiet, optimizer: Optimizer) -> bool:
        """True when the step went the short way; one that is unusual in any way goes the long one from its beginning."""
        if (
            self._stepping is not None
            or self.backwards == self._backwards_then
            or self._loop != "optimizer"
            or self.arrivals.pending
            or torch._C._current_graph_task_id() != -1
        ):
            return False
        started = perf_counter()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # noqa: FBT003
        try:
            if not quiet.take(optimizer, self.rows, self.losses):
                return False
            self.rows.skipping.made()
        except Exception:
            return False  # the long way fails in the same place, and tells
        finally:
            torch._C._set_grad_enabled(grad)
            self.seconds += perf_counter() - started
        self._stepping, self._stepping_at = quiet.optimizer, self.backwards
        self._backwards_then = self.backwards
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
        self.rows.skipping.fresh = self.backwards != self._backwards_then
        if not self.rows.skipping.fresh:
            self.arrivals.missed(enough=True)
        self._backwards_then = self.backwards
        if self._loop != "explicit":
            self._loop = "optimizer"
        mine.restore(late=True)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if not callable(closure):
            if self._loop == "optimizer":
                self._take(mine, "optimizer step", optimizer)
            return None
        self.rows.skipping.expect_closure(mine)
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
        self.rows.tell_left_out(mine)
        self._inside_family = mine.family

    def _end_of_fused_backward(self) -> None:
        parts, self._inside = self._inside, []
        self._inside_seen.clear()
        self.rows.take_parts(parts, self._inside_family)

    def after_step(self, optimizer: Optimizer) -> None:
        """Give back the gradients that were hidden so that the optimizer skipped them."""
        mine = self._known.get(id(optimizer))
        if mine is not None and mine.parameters:
            mine.restore()
            self.rows.skipping.over()
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
                self._guarded(self._take, mine, "closure", optimizer, loss)
            self._guarded(self.rows.skipping.closure_evaluated, mine, evaluations)
            return loss

        return wrapped

    def explicit_step(self) -> None:
        """The user says that the update is about to happen."""
        self._loop = "explicit"
        self._guarded(self._take, self._everything(), "monitor.step()")

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
        mine = Gradients(pairs, len(self._layers), groups, len(held), optimizer, self._layers.model)
        known, numbers, gone, key = self._known, self._numbers, self._gone, id(optimizer)
        if pairs and key not in numbers:
            numbers[key] = next(self._found)
        mine.number = numbers.get(key, -1)
        known[key] = mine
        gone[key] = weakref.ref(optimizer, lambda _: _forget((known, numbers, gone), key))
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
        if self._stray is not None:  # the backward just now was this model's, by parameters not known then
            self.losses.add_root(self._stray)
        self.rows.grow(news)
        self.arrivals.grow()
        judge = self._judge()
        if judge is not None:
            judge.grown(self._layers)

    def _everything(self) -> Gradients:
        if self._all is None:
            self._all = Gradients(list(self._layers.parameters()), len(self._layers))
        return self._all

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
            if self.rows.over and self.active:
                self._give_up()


def _forget(dicts: Sequence[dict[int, Any]], key: int) -> None:
    for one in dicts:
        one.pop(key, None)
