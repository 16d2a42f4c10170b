"""Monitor: owns the parts of one watched model, from start to detach."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import weakref
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
import torch

from gradwatch.autoclip.decision import NOTHING
from gradwatch.autoclip.engine import AutoClipEngine
from gradwatch.autoclip.suggest import Suggestion, suggest
from gradwatch.distributed.agreement import settings_of
from gradwatch.errors import TrainingUnstableError, UsageError, words_of
from gradwatch.history.ring import History
from gradwatch.history.saved import entries, refuse, whole_number
from gradwatch.measure.batch_statistics import numbers_of
from gradwatch.measure.checkpoints import Checkpoint, damage_of, worth_of
from gradwatch.measure.layers import Layers, facts_of, optimizer_facts
from gradwatch.measure.wrappers import unwrapped
from gradwatch.pipeline import Pipeline
from gradwatch.printable import printable
from gradwatch.probe.budget import Budget
from gradwatch.probe.probe import Probe
from gradwatch.shutdown import Failure, all_done

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from rich.console import RenderableType
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.autoclip.decision import Decision, DevicePlan
    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.history.schedule import Bounds
    from gradwatch.records import Alarm, Incident, Row
    from gradwatch.reports import Report
    from gradwatch.rules import Rule

_log = logging.getLogger("gradwatch")

# model -> its monitor: keeps the monitor alive for as long as the model lives, and no longer
attached: weakref.WeakKeyDictionary[nn.Module, Monitor] = weakref.WeakKeyDictionary()


class Monitor:
    """Watches one model. Made by `gradwatch.attach`; a context manager that detaches at its end."""

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Rule],
        policy: AutoClip | None,
        reports: Sequence[Report],
        *,
        scaler: torch.amp.GradScaler | None = None,
        every: int | Budget = 1,
        strict: bool = False,
    ) -> None:
        layers = self._layers = Layers(model)
        self._model = weakref.ref(model)
        self._strict = strict
        self._told: set[str] = set()
        self.history = History(layers.names, layers.sizes, layers.matrices, layers.fan_in)
        facts = facts_of(model, layers, str(policy.clip) if policy else None)
        self.history.facts = replace(facts, clips_always=policy is not None and policy.when == "always")
        self._batch: Any = None
        clipping = AutoClipEngine(policy, self.history) if policy is not None else None
        self._pipeline = Pipeline(self.history, rules, clipping, reports, self.failed)
        if self._pipeline.clipping is not None:
            self._pipeline.clipping.damage = self._damage
        pace = {"every": 1, "budget": every.share} if isinstance(every, Budget) else {"every": every, "budget": None}
        self._pace = {"gradwatch": sys.modules["gradwatch"].__version__, **pace}
        self._probe = Probe(layers, self, every, scaler)
        self.attached = False

    # Life.

    def record(self, folder: Path) -> None:
        """Keep the run in a run log from its first row on; `gradwatch.attach` calls it.

        Raises:
            RunLogError: the log is damaged, foreign, of another model, or written by another process.
        """
        from gradwatch.runlog.environment import environment_of  # SQLite is loaded only when there is a log
        from gradwatch.runlog.recording import Recording, columns_of
        from gradwatch.runlog.store import Store

        clipping = self._pipeline.clipping
        environment = environment_of(self._pipeline.alarms.rules, clipping.policy if clipping else None)
        try:
            store = Store(folder, columns_of(self.history), environment, self.history.facts)
        except OSError as error:
            self._disk_failed(f"the run log {folder} cannot be written: {error}. Training goes on without it.")
        else:
            recording = Recording(store, self.history, self._disk_failed, environment, self._numbers_of_batch)
            self._pipeline.record(recording)

    def _disk_failed(self, text: str) -> None:
        self.note(text)
        _say(logging.WARNING, printable(text))

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Put the hooks in place; `gradwatch.attach` calls it."""
        try:
            self._probe.start(optimizer)
        except BaseException:
            self._probe.stop()
            if self._pipeline.log is not None:
                self._pipeline.log.abandon()
            raise
        self.attached = True
        model = self._model()
        assert model is not None
        attached[model] = self
        self._finish = weakref.finalize(model, _end, weakref.ref(self))
        self._finish.atexit = False
        atexit.register(self._at_exit)
        try:
            self._pipeline.start()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook and tap, end the reports; the model is as it was before. Safe to call twice."""
        self._raise_first(self.end())

    def end(self) -> list[Failure]:
        """Do all that `detach` does, each part whatever becomes of the others; tell of what failed, and return it."""
        if not self.attached:
            return []
        self.attached = False
        failures = all_done(
            [
                ("the exit handler", lambda: atexit.unregister(self._at_exit)),
                ("the finalizer", lambda: self._finish.detach() and None),
                ("the list of monitors", self._forget),
                ("the probe", self._probe.stop),
                ("the reports", lambda: self._pipeline.close(self._probe.seconds)),
            ]
        )
        self._batch = None
        for part, error in failures:
            if isinstance(error, Exception):
                self._tell(f"{part} failed at the end", error)
        return failures

    def _forget(self) -> None:
        model = self._model()
        if model is not None:
            attached.pop(model, None)

    def _raise_first(self, failures: list[Failure]) -> None:
        """Raise the user's interrupt, and what failed where strict."""
        for _, error in failures:
            if self._strict or not isinstance(error, Exception):
                raise error

    def replaced(self, model: nn.Module) -> str:
        """End, because ``model`` is attached; return what the new monitor has to say of that."""
        steps, log, mine = self.history.row.step + 1, self._pipeline.log, self._model()
        same = mine is not None and unwrapped(mine) is unwrapped(model)
        self._raise_first([failure for failure in self.end() if not isinstance(failure.error, Exception)])
        told = (
            "this {} was watched already"
            if same
            else "an earlier {} with the same layers and run log was still watched"
        )
        return (
            f"{told.format(self.history.facts.model)}, for {steps:,} steps: that monitor is detached"
            f"{f', its run log {log.folder} ended' if log is not None else ''}."
        )

    def writes(self, folder: Path) -> bool:
        """True when the run log in this folder is this monitor's."""
        return self._pipeline.log is not None and self._pipeline.log.folder.resolve() == folder.resolve()

    def clips_any(self, model: nn.Module) -> bool:
        """True when auto-clip acts on at least one of the model's parameters."""
        return self._pipeline.clipping is not None and any(
            self._layers.column(parameter) is not None for parameter in model.parameters()
        )

    def owns_any(self, optimizer: Optimizer) -> bool:
        """True when the optimizer holds at least one of the watched parameters."""
        return self._probe.owns_any(optimizer)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failures = []
        if isinstance(error, Exception) and self.attached:
            failures += all_done([("the flight recorder", lambda: self._raised(error))])
        failures += self.end()
        # an error of the training goes first
        self._raise_first([one for one in failures if error is None or not isinstance(one.error, Exception)])

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the program, unless it is a notebook or a prompt
        if isinstance(error, Exception) and not hasattr(sys, "ps1") and "IPython" not in sys.modules:
            all_done([("the flight recorder", lambda: self._raised(error))])
        self.end()

    def _raised(self, error: Exception) -> None:
        self._probe.catch_up()
        self._pipeline.raised(error, self._probe.seconds)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return (
            f"<gradwatch.Monitor of {self.history.facts.model}, {state}, step {self.history.row.step}: {self.verdict}>"
        )

    # What the user says.

    def loss(self, loss: Tensor | SupportsFloat) -> Any:
        """Hand over the loss of the coming step and return it unchanged. It outranks the loss found by itself.

        Several of one step add up, as those of accumulated backwards do.
        ``loss`` is a number or a tensor of one element; anything else raises `UsageError`.
        """
        number = isinstance(loss, Real) or (isinstance(loss, torch.Tensor) and loss.numel() == 1)
        if not number:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise UsageError(f"monitor.loss() got {shape}; expected a number or a tensor of one element: loss.mean()?")
        self._probe.losses.give(loss)
        return loss

    def batch(self, batch: Any) -> Any:
        """Hand over the coming step's batch and return it unchanged, for the flight recorder of the run log.

        When training raises or an incident becomes critical, shape, range, mean, NaN and Inf of its tensors are kept. It is
        held until the next one, and looked at only then. ``batch``: a tensor, or tensors in lists, tuples and dicts.
        """
        self._batch = batch
        return batch

    def _numbers_of_batch(self) -> list[dict[str, Any]] | None:
        try:
            return None if self._batch is None else numbers_of(self._batch)
        except Exception as error:  # a batch of a kind that cannot be read must not cost the rest of the record
            return [{"name": "batch", "error": words_of(error)}]

    def step(self) -> None:
        """Say that the update is about to happen: only for loops with no torch.optim optimizer."""
        self._probe.explicit_step()

    # What the user reads.

    @property
    def alarms(self) -> list[Alarm]:
        """The last 2,000 changes of state of the rules, oldest first."""
        self._probe.catch_up()
        return list(self._pipeline.changes)

    @property
    def incidents(self) -> list[Incident]:
        """The incidents so far, in opening order, at most the last 1,000.

        Where gradients live on a device, this waits for the rows under way.
        """
        self._probe.catch_up()
        return list(self._pipeline.incidents.all)

    @property
    def verdict(self) -> str:
        """The run in one word: ``"healthy"``, ``"suspected"`` or ``"confirmed"``. Waits as `incidents` does."""
        self._probe.catch_up()
        return self._pipeline.verdict

    @property
    def notes(self) -> list[str]:
        """What gradwatch could not do, each said once."""
        return list(self._pipeline.notes)

    def flush(self, timeout: float = 10.0) -> bool:
        """Have all rows so far written to the run log; False when that takes more than ``timeout`` seconds, or there is none."""
        self._probe.catch_up()
        return self._pipeline.flush(self._probe.seconds, timeout)

    def checkpoint_guard(self) -> Checkpoint:
        """Say whether the model is worth a checkpoint: ``if monitor.checkpoint_guard(): torch.save(...)``.

        The answer is true or false, and its ``reason`` says why it is false. It is while an incident of an explosion that is more
        than a notice is open, when the last loss was not finite, or when a parameter or buffer is not finite now. Reads
        the model's values: for checkpoints, not for each step. In a distributed training all processes get the same answer, by
        what they last shared: weights and buffers are looked at on the first 32 steps, at least on every 32nd later, and on
        each step while an incident is open.
        """
        self._probe.catch_up()
        model = self._model()
        if model is None:
            return Checkpoint("the model is gone")
        well = self._probe.rows.buffers_are_well
        return worth_of(model, self.history, self._pipeline.incidents.open, buffers_are_well=well)

    def _damage(self) -> str:
        model = self._model()
        try:
            with torch.no_grad():
                return damage_of(model) if model is not None else ""
        except Exception as error:  # a tensor of a kind that cannot be read
            return f"the model cannot be read: {words_of(error)}"

    def summary(self) -> RenderableType:
        """Return the run so far as a rich renderable; ``str()`` of it is plain text."""
        from gradwatch.reports.summary import Summary  # rich is loaded only when something is shown

        self._probe.catch_up()
        return Summary(self._pipeline.snapshot(self._probe.seconds))

    def suggest_clip(self) -> Suggestion:
        """Say what threshold this run's own norms suggest, and how many steps each choice would have clipped.

        By the rows that the history keeps, norms before any clip; raises `UsageError` before there are 16 finite ones.
        """
        self._probe.catch_up()
        return suggest(self.history.global_norm())

    def state_dict(self) -> dict[str, Any]:
        """Return the run's baselines, in plain lists, so that a resumed run need not learn them again."""
        self._probe.catch_up()
        return {"version": 1, "step": self._probe.rows.step, "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises `UsageError`, and takes nothing, where it is damaged or of other layers."""
        kept = entries(state, ("step", "history"), "state")
        version = whole_number(kept.get("version", 1), 'state["version"]')
        if version != 1:
            refuse('state["version"]', str(version), "1: another gradwatch has made it")
        step = whole_number(kept["step"], 'state["step"]')
        self._probe.catch_up()  # rows under way are those of steps that were made
        self.history.load_state_dict(kept["history"])
        self._probe.rows.step = step
        self._pipeline.went_back()

    # What the probe reports.

    def optimizer_found(self, optimizer: Optimizer) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        self.history.facts = optimizer_facts(self.history.facts, optimizer)
        if self.history.facts.clip is not None and isinstance(optimizer, torch.optim.LBFGS):
            self.note("auto-clip does not clip inside a line search, as that of LBFGS.")

    def grown(self, layers: Layers) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        self._pipeline.grow(layers)
        model = self._model()
        if model is not None:
            facts = facts_of(model, layers, self.history.facts.clip)
            self.history.facts = replace(
                self.history.facts, layers=facts.layers, parameters=facts.parameters, depth=facts.depth
            )

    def note(self, text: str) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        if text not in self._pipeline.notes:
            self._pipeline.notes.append(text)

    def judge(self, row: Row) -> Decision:
        """See `gradwatch.probe.judge.Judge`."""
        if self._probe.arrivals.order is not None:
            self.history.order = self._probe.arrivals.order
        if row.rate is not None and row.rate is not self.history.rate:
            self.history.facts = replace(self.history.facts, rate=float(np.nanmax(row.rate, initial=0.0)))
        try:
            decision = self._pipeline.step(row)
        except TrainingUnstableError:
            self._pipeline.report(self._probe.seconds)
            raise
        self._probe.watch_closely(closely=self._pipeline.incidents.exploding)
        if decision is NOTHING:
            self._pipeline.report(self._probe.seconds)
        return decision

    def startled(self, row: Row) -> bool:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.startled(row)

    def bounds(self) -> Bounds | None:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.bounds()

    def may_skip(self) -> bool:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.clipping is not None and self._pipeline.clipping.policy.skips

    def orders(self) -> DevicePlan | None:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.orders()

    def settings(self) -> dict[str, str]:
        """See `gradwatch.probe.judge.Judge`."""
        clipping = self._pipeline.clipping
        return settings_of(self._pipeline.alarms.rules, clipping.policy if clipping is not None else None, self._pace)

    def together(self, lag: int) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        self._pipeline.alarms.lag = lag

    def said(self) -> tuple[int, int]:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.alarms.failed, self._pipeline.decided

    def switch_off(self, rules: int) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        for rule in self._pipeline.alarms.switch_off(rules):
            self.note(
                f"rule {rule} failed in another process, whose output has the cause: it is switched off here too."
            )

    def disarm(self, reason: str) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        self._pipeline.disarm()
        self.note(reason)

    @property
    def own_clip(self) -> bool:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.own_clip

    @property
    def may_clip(self) -> bool:
        """See `gradwatch.probe.judge.Judge`."""
        return self._pipeline.may_clip

    def done(self, row: Row, decision: Decision, coefficient: float) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        self._pipeline.done(row, decision, coefficient)
        self._pipeline.report(self._probe.seconds)

    def failed(self, part: str, error: Exception) -> None:
        """See `gradwatch.probe.judge.Judge`."""
        if self._strict:
            raise error
        self._tell(f"{part} failed and is switched off", error)

    def _tell(self, what: str, error: Exception) -> None:
        """Say once what failed."""
        if what not in self._told:
            self._told.add(what)
            self._pipeline.notes.append(f"{what}: {words_of(error)}")
            _say(logging.ERROR, f"{what}; training goes on.", error)


def monitor_of(model: nn.Module) -> Monitor | None:
    """Return the monitor that watches ``model``, None when none does.

    A model and what is built around it, as DistributedDataParallel and `torch.compile` are, is one. A part of a watched model
    has no monitor of its own. Raises `UsageError` for what is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"monitor_of() got {type(model).__name__}; expected a torch.nn.Module.")
    if model in attached:
        return attached[model]
    mine = unwrapped(model)
    return next((monitor for other, monitor in list(attached.items()) if unwrapped(other) is mine), None)


def _say(level: int, text: str, error: Exception | None = None) -> None:
    """Log; what handlers of the program, or a standard error stream that is closed, make of it must not reach the training."""
    with contextlib.suppress(Exception):
        _log.log(level, "gradwatch: %s", text, exc_info=error)


def _end(monitor: weakref.ref[Monitor]) -> None:
    """The model is gone: end its monitor too."""
    here = monitor()
    if here is not None:
        here.end()
