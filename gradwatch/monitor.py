"""`Monitor`: owns everything that watches one model, from `attach` to `detach`."""

from __future__ import annotations

import atexit
import sys
import weakref
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from gradwatch.autoclip.engine import AutoClipEngine
from gradwatch.autoclip.suggest import Suggestion, suggest
from gradwatch.cells import is_interactive, running_cell
from gradwatch.errors import UsageError, words_of
from gradwatch.forensics import Inspector
from gradwatch.history.history import History
from gradwatch.history.saved import entries, refuse, whole_number
from gradwatch.measure.batch_statistics import numbers_of
from gradwatch.measure.checkpoints import Checkpoint, damage_without_waiting, worth_of
from gradwatch.measure.layers import Layers, facts_of
from gradwatch.measure.parts import Parts
from gradwatch.measure.wrappers import unwrapped
from gradwatch.pipeline import Pipeline
from gradwatch.probe import Budget, Probe
from gradwatch.records import OwnTime
from gradwatch.reports.notes import Notes
from gradwatch.shutdown import Failure, all_done
from gradwatch.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from rich.console import RenderableType
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.forensics import Mode
    from gradwatch.records import Alarm, Incident, RunVerdict, Snapshot
    from gradwatch.reports import Report
    from gradwatch.reports.base import RunLogReport
    from gradwatch.rules import Rule


# model -> its monitor, which is kept alive as long as the model, or as its parts if the model was no more than a container
attached: weakref.WeakKeyDictionary[nn.Module, Monitor] = weakref.WeakKeyDictionary()


class Monitor:
    """Watches one model. `gradwatch.attach` returns it; as a context manager it detaches at the end of the block.

    Attributes:
        history: the last rows of the run and the reference values learned from them.
        attached: True until `detach`.
        cell: cell of a notebook that attached it; None outside notebooks.
    """

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
        forensics: Mode | None = None,
        name: str = "",
    ) -> None:
        layers = self._layers = Layers(model)
        self._notes = Notes(strict=strict)
        self._batch: Any = None
        self.history = History(layers.names, layers.sizes, layers.matrices, layers.fan_in)
        facts = facts_of(model, layers, str(policy.clip) if policy else None)
        self.history.know(replace(facts, name=name, clips_always=policy is not None and policy.when == "always"))
        autoclip = AutoClipEngine(policy, self.history) if policy is not None else None
        own_time = OwnTime()
        broken = partial(_asked, weakref.WeakMethod(self._damage))
        self._pipeline = Pipeline(self.history, rules, autoclip, reports, self._notes, own_time, broken=broken)
        pace = {"every": 1, "budget": every.share} if isinstance(every, Budget) else {"every": every, "budget": None}
        installed = {"gradwatch": VERSION}
        self._inspector: Inspector | None = None
        if forensics is not None:
            told = (
                self._pipeline.found,
                self._pipeline.not_found,
                self._pipeline.note,
                partial(self._notes.part_failed, "finding the operation"),
            )
            share = every.share if isinstance(every, Budget) else None
            self._inspector = Inspector(model, forensics, *told, own_time, share)
        self._probe = Probe(layers, self._pipeline, installed | pace, every, scaler, own_time, self._inspector)
        self.attached = False
        self.cell = running_cell()
        self._finalizers: list[weakref.finalize[..., Any]] = []
        self._rows_of_model = 0  # rows when a model was gone that its parts have outlived

    def _damage(self) -> str:
        """Return what of the model is not finite, in words; nothing where all of it is."""
        model = self._layers.model
        if model is None:
            return ""
        try:
            with torch.no_grad():
                return damage_without_waiting(model, self.history, self._layers.constants)
        except Exception as error:  # a tensor of a kind that cannot be read
            return f"the model cannot be read: {words_of(error)}"

    # Life.

    def record(self, folder: Path) -> None:
        """Write the run to a run log from its first row on. Called by `gradwatch.attach`.

        Raises:
            RunLogError: the log is damaged, of another program or model, or written by another process.
        """
        from gradwatch.runlog.environment import environment_of  # SQLite is loaded only when there is a log
        from gradwatch.runlog.recording import Recording, columns_of
        from gradwatch.runlog.store import Store

        environment = environment_of(self._pipeline.rules, self._pipeline.policy)
        try:
            store = Store(folder, columns_of(self.history), environment, self.history.facts)
        except OSError as error:
            self._notes.warn(f"the run log {folder} cannot be written: {error}. Training goes on without it.")
        else:
            recording = Recording(store, self.history, self._notes.warn, environment, self._numbers_of_batch)
            self._pipeline.desk.keep(recording)

    def keep_batches(self, folder: Path | None) -> None:
        """Write the inputs of a step that fails into the folder of the run log, if one is given. Called by `gradwatch.attach`."""
        if self._inspector is not None and folder is not None:
            self._inspector.keep_in(folder)

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Install the hooks and start the reports. Called by `gradwatch.attach`."""
        try:
            self._probe.start(optimizer)
        except BaseException:
            self._probe.stop()
            if self._log is not None:
                self._log.abandon()
            raise
        self.attached = True
        model = self._layers.model
        assert model is not None
        attached[model] = self
        self._end_with([model], _model_gone)
        atexit.register(self._at_exit)
        try:
            self._pipeline.desk.start()
        except BaseException:
            self.detach()
            raise

    def _end_with(
        self, objects: Iterable[nn.Module | nn.Parameter], end: Callable[[weakref.ref[Monitor]], None]
    ) -> None:
        """From now on, call ``end`` when one of these objects ceases to exist."""
        for one in self._finalizers:
            one.detach()
        self._finalizers = [weakref.finalize(one, end, weakref.ref(self)) for one in objects]
        for one in self._finalizers:
            one.atexit = False

    def outlive_model(self) -> None:
        """Go on with the parts of a model that is gone, if all of them outlive it; else end."""
        parts = self._layers.outlive_model()
        if parts is None:
            self.end()
        else:
            attached[parts] = self
            if self._inspector is not None:
                self._inspector.follow(parts)
            self._rows_of_model = self.history.rows
            self._end_with(parts, _part_gone)

    def outlive_part(self) -> None:
        """Go on with the other parts, unless this is the end of the model itself, whose parts follow it at once."""
        parts = self._layers.outlive_part() if self.history.rows > self._rows_of_model else None
        if parts is None:
            self.end()
        else:
            self._end_with(parts, _part_gone)

    def detach(self) -> None:
        """Remove all hooks and patches and end the reports, so that the model is as before. It can be called repeatedly."""
        self._raise_first(self.end())

    def end(self) -> list[Failure]:
        """Do what `detach` does, but report and return what failed instead of raising it.

        Each part ends even if another one fails.
        """
        if not self.attached:
            return []
        self.attached = False
        failures = all_done(
            [
                ("the exit handler", lambda: atexit.unregister(self._at_exit)),
                ("the finalizers", lambda: self._end_with([], _part_gone)),
                ("the list of monitors", self._forget),
                ("the probe", self._probe.stop),
                ("the reports", self._pipeline.desk.close),
            ]
        )
        self._batch = None
        for part, error in failures:
            if isinstance(error, Exception):
                self._notes.error(f"{part} failed at the end", error)
        return failures

    def _forget(self) -> None:
        for model in [model for model, monitor in list(attached.items()) if monitor is self]:
            del attached[model]

    def _raise_first(self, failures: list[Failure]) -> None:
        """Raise the first failure that is an interrupt by the user; any failure if strict."""
        for _, error in failures:
            if self._notes.strict or not isinstance(error, Exception):
                raise error

    def replaced(self, model: nn.Module) -> str:
        """End because ``model`` is attached anew; return the note in which the new monitor reports it."""
        steps, log, mine = self.history.row.step + 1, self._log, self._layers.model
        same = mine is not None and _are_one(mine, model)
        again = running_cell()
        self._raise_first([failure for failure in self.end() if not isinstance(failure.error, Exception)])
        told = (
            "this {} was watched already"
            if same
            else "an earlier run of this cell attached to another {}, which was still watched"
            if again is not None and self.cell is not None and self.cell.key == again.key
            else "an earlier {} with the same layers and run log was still watched"
        )
        return (
            f"{told.format(self.history.facts.called)}, for {steps:,} steps: that monitor is detached"
            f"{f', its run log {log.folder} ended' if log is not None else ''}."
        )

    def note(self, text: str) -> None:
        """Report once what the user should know about this run."""
        self._notes.add(text)

    @property
    def _log(self) -> RunLogReport | None:
        return self._pipeline.desk.log

    def writes(self, folder: Path) -> bool:
        """Return whether this monitor writes the run log in ``folder``."""
        return self._log is not None and self._log.folder.resolve() == folder.resolve()

    def clips_any(self, model: nn.Module) -> bool:
        """Return whether auto-clip of this monitor acts on at least one parameter of ``model``."""
        return self._pipeline.policy is not None and any(
            self._layers.column(parameter) is not None for parameter in model.parameters()
        )

    def owns_any(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer holds at least one watched parameter."""
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
        # an error of the training takes precedence
        self._raise_first([one for one in failures if error is None or not isinstance(one.error, Exception)])

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the program, unless it is a notebook or a prompt
        if isinstance(error, Exception) and not is_interactive():
            all_done([("the flight recorder", lambda: self._raised(error))])
        self.end()

    def _raised(self, error: Exception) -> None:
        self._probe.catch_up()
        if self.history.rows:
            self._pipeline.desk.raised(error)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return (
            f"<gradwatch.Monitor of {self.history.facts.called}, {state}, step {self.history.row.step}: {self.verdict}>"
        )

    def _repr_html_(self) -> str:
        from gradwatch.reports.card import card_of  # rich is loaded only when something is shown

        self._probe.catch_up()
        return card_of(self._pipeline.snapshot(), live=self.attached)

    # What the user passes.

    def loss(self, loss: Tensor | SupportsFloat) -> Any:
        """Set the loss of the coming step and return it unchanged. It takes precedence over the loss that is found automatically.

        Several losses of one step are summed, like those of accumulated backwards.

        Args:
            loss: a number or a tensor with one element.

        Raises:
            UsageError: ``loss`` is anything else.
        """
        number = isinstance(loss, Real) or (isinstance(loss, torch.Tensor) and loss.numel() == 1)
        if not number:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise UsageError(f"monitor.loss() got {shape}; expected a number or a tensor of one element: loss.mean()?")
        self._probe.losses.give(loss)
        return loss

    def batch(self, batch: Any) -> Any:
        """Set the batch of the coming step for the flight recorder of the run log, and return it unchanged.

        When training raises or an incident becomes critical, the shape, range, mean and number of NaN and Inf of its tensors
        are kept. The batch is held until the next one is set, and is not read otherwise.

        Args:
            batch: a tensor, or tensors in lists, tuples and dicts.
        """
        self._batch = batch
        if self._inspector is not None:
            self._inspector.given(batch)
        return batch

    def _numbers_of_batch(self) -> list[dict[str, Any]] | None:
        try:
            return None if self._batch is None else numbers_of(self._batch)
        except Exception as error:  # a batch that cannot be read must not prevent the rest of the record
            return [{"name": "batch", "error": words_of(error)}]

    def step(self) -> None:
        """Record a step just before its update. Only for loops without a ``torch.optim`` optimizer."""
        self._probe.explicit_step()

    def clip_begins(self) -> None:
        """Measure the gradients just before code of your own clips them in place. Clips of torch are found automatically."""
        self._probe.own_clip_begins()

    # What the user reads.

    @property
    def alarms(self) -> list[Alarm]:
        """The last 2,000 alarms, which are changes of state of rules, oldest first. Waits as `incidents` does."""
        self._probe.catch_up()
        return list(self._pipeline.changes)

    @property
    def incidents(self) -> list[Incident]:
        """The last 1,000 incidents, in the order in which they were opened.

        If gradients are on a device, this waits for the rows under way.
        """
        self._probe.catch_up()
        return list(self._pipeline.incidents.all)

    @property
    def verdict(self) -> RunVerdict:
        """The state of the run: ``"healthy"``, ``"suspected"``, ``"confirmed"`` or ``"damaged"``. Waits as `incidents` does.

        `gradwatch.records.VERDICTS` defines the words; reports and `checkpoint_guard` follow them.
        """
        self._probe.catch_up()
        return self._pipeline.verdict

    @property
    def notes(self) -> list[str]:
        """What gradwatch reported about this run besides incidents, such as what it could not do; each once."""
        return list(self._notes.all)

    def flush(self, timeout: float = 10.0) -> bool:
        """Write all rows so far to the run log and return True.

        False if this takes more than ``timeout`` seconds, or if there is no log or no row.
        """
        self._probe.catch_up()
        return self.history.rows > 0 and self._pipeline.desk.flush(timeout)

    def checkpoint_guard(self) -> Checkpoint:
        """Return whether the model is worth a checkpoint: ``if monitor.checkpoint_guard(): torch.save(...)``.

        The result is true or false, and its ``reason`` says why it is false: the verdict is not healthy, the last loss was not
        finite, or a parameter or buffer is not finite now. Buffers that were not finite when the model was attached, such as a
        causal mask of minus infinity, do not count. This reads all values of the model, so it is meant for checkpoints and not
        for each step. In distributed training all processes get the same result, from what they last exchanged: weights
        and buffers are checked at the first 32 steps, at least at every 32nd step later, and at each step while an explosion is
        open.
        """
        self._probe.catch_up()
        model = self._layers.model
        if model is None:
            return Checkpoint("the model is gone")
        incidents = self._pipeline.incidents
        return worth_of(model, self.history, [*incidents.open, *incidents.damaged], self._layers.constants)

    def snapshot(self) -> Snapshot:
        """Return the state of the run as reports receive it. It does not wait for rows that are under way on a device."""
        return self._pipeline.snapshot()

    def summary(self) -> RenderableType:
        """Return a summary of the run so far as a rich renderable; ``str()`` of it is plain text."""
        from gradwatch.reports.summary import Summary  # rich is loaded only when something is shown

        self._probe.catch_up()
        return Summary(self._pipeline.snapshot())

    def suggest_clip(self) -> Suggestion:
        """Return the clipping threshold that this run's norms suggest, and how many steps each choice would have clipped.

        It is computed from the rows that the history keeps, by norms before any clip.

        Raises:
            UsageError: fewer than 16 norms are finite and above zero.
        """
        self._probe.catch_up()
        return suggest(self.history.global_norm())

    def state_dict(self) -> dict[str, Any]:
        """Return the reference values of the run as plain lists, so that a resumed run need not learn them again."""
        self._probe.catch_up()
        return {"version": 1, "step": self._probe.recorder.step, "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UsageError: the state is damaged or belongs to other layers. Nothing is restored then.
        """
        kept = entries(state, ("step", "history"), "state")
        version = whole_number(kept.get("version", 1), 'state["version"]')
        if version != 1:
            refuse('state["version"]', str(version), "1; another version of gradwatch has made it")
        step = whole_number(kept["step"], 'state["step"]')
        self._probe.catch_up()  # rows under way are those of steps that were made
        self.history.load_state_dict(kept["history"])
        self._probe.recorder.go_on_from(step)
        self._pipeline.desk.went_back()


def monitor_of(model: nn.Module) -> Monitor | None:
    """Return the monitor that watches ``model``; None if there is none.

    A model and its wrappers, such as DistributedDataParallel and `torch.compile`, count as one model. A submodule of a watched
    model has no monitor of its own.

    Raises:
        UsageError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"monitor_of() got {type(model).__name__}; expected a torch.nn.Module.")
    if model in attached:
        return attached[model]
    return next((monitor for other, monitor in list(attached.items()) if _are_one(other, model)), None)


def _are_one(watched: nn.Module, model: nn.Module) -> bool:
    """Return whether two models are the same but for wrappers, or one is what was in a container that is gone."""
    mine = unwrapped(model)
    return unwrapped(watched) is mine or (isinstance(watched, Parts) and watched.are_in(mine))


def _asked(question: weakref.WeakMethod[Callable[[], str]]) -> str:
    """Return the answer of an object; empty if the object no longer exists."""
    ask = question()
    return ask() if ask is not None else ""


def _model_gone(monitor: weakref.ref[Monitor]) -> None:
    here = monitor()
    if here is not None:
        here.outlive_model()


def _part_gone(monitor: weakref.ref[Monitor]) -> None:
    here = monitor()
    if here is not None:
        here.outlive_part()
