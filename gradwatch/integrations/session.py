"""One training under a trainer of a framework: attached, logged, stopped, resumed and detached. All callbacks are made of it."""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np

from gradwatch.attach import attach
from gradwatch.cells import is_notebook
from gradwatch.errors import UsageError, did_you_mean, shown
from gradwatch.reports.base import Report
from gradwatch.reports.log import write_line
from gradwatch.reports.scalars import root_of, scalars_of, text_of
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import nn
    from torch.optim import Optimizer

    from gradwatch.autoclip.policy import AutoClip
    from gradwatch.clips import Clip
    from gradwatch.monitor import Monitor
    from gradwatch.records import Incident, Snapshot
    from gradwatch.rules import Rule

StopOn = Literal["suspected", "confirmed"]
_STOPS: dict[StopOn, tuple[str, ...]] = {"suspected": ("suspected", "confirmed"), "confirmed": ("confirmed",)}

_log = logging.getLogger("gradwatch")


class Settings(TypedDict, total=False):
    """The arguments of `gradwatch.attach`, without the model."""

    optimizer: Optimizer | None
    scaler: torch.amp.GradScaler | None
    rules: Sequence[Rule] | None
    clip: str | Clip | AutoClip | None
    report: str | Report | Sequence[Report | str] | None
    log: str | os.PathLike[str] | None
    every: int
    strict: bool
    budget: float | None
    forensics: bool | str
    save_batch: bool
    name: str | None


class News(Report):
    """Collects what the trainer's logger and the trainer itself have to be told.

    Attributes:
        verdict: verdict of the run at the last change of an incident.
        incidents: incidents that changed since they were last taken, by number.
    """

    def __init__(self) -> None:
        self.verdict = "healthy"
        self.incidents: dict[int, Incident] = {}

    def step(self, snapshot: Snapshot) -> None:
        """Collect the incidents that changed. It is called at once when one does."""
        self.verdict = snapshot.verdict
        self.incidents |= {one.number: one for one in snapshot.news}

    def close(self, snapshot: Snapshot) -> None:
        """Collect what changed last."""
        self.step(snapshot)

    def take(self) -> list[Incident]:
        """Return the incidents that changed since the last call."""
        changed = [one for _, one in sorted(self.incidents.items())]
        self.incidents.clear()
        return changed


class Session:
    """Watches the trainings of one callback, one after the other.

    The report is a card in a notebook, and log lines elsewhere, unless another one is given: a live view would overwrite the
    trainer's own progress bar.

    Args:
        stop_on: verdict at which training is to end; None: it is never ended.
        worst: number of layers closest to their limits whose norms are logged.
        settings: arguments of `gradwatch.attach`.

    Attributes:
        monitor: monitor of the current or last training; None before the first one.
        root: what the names of all that is logged begin with.

    Raises:
        UsageError: an argument is unknown or invalid.
    """

    def __init__(self, stop_on: StopOn | None, worst: int, settings: Settings) -> None:
        if stop_on is not None and stop_on not in _STOPS:
            raise UsageError(f"stop_on is {shown(stop_on)}; expected {', '.join(map(repr, _STOPS))} or None.")
        if isinstance(worst, bool) or not isinstance(worst, int) or worst < 0:
            raise UsageError(f"worst is {shown(worst)}; expected a number of layers, such as 5.")
        known = set(inspect.signature(attach).parameters) - {"model"}
        unknown = next((name for name in settings if name not in known), None)
        if unknown is not None:
            raise UsageError(f"gradwatch.attach() has no argument {unknown!r}.{did_you_mean(unknown, known)}")
        self._settings: dict[str, Any] = dict(settings)
        self._settings["report"] = _beside_bars(self._settings.get("report", "auto"))
        self._stops = _STOPS[stop_on] if stop_on is not None else ()
        self._worst = worst
        self.root = root_of(self._settings.get("name") or "")
        self._news = News()
        self._verdict_logged = ""
        self._stop_told = False
        self._refused = ""
        self.monitor: Monitor | None = None

    # Life.

    def begin(self, model: nn.Module, saved: dict[str, Any] | None = None) -> None:
        """Attach to the model of a training that begins; ``saved`` is the state that its checkpoint has, if it is resumed.

        Raises:
            UsageError, RunLogError: as `gradwatch.attach`. Nothing is left attached.
        """
        self.end()
        self._news, self._verdict_logged, self._stop_told, self._refused = News(), "", False, ""
        self.monitor = attach(model, **{**self._settings, "report": [*self._settings["report"], self._news]})
        if saved is not None:
            self.resume(saved)

    def resume(self, saved: dict[str, Any]) -> None:
        """Use the reference values of a checkpoint; if they cannot be used, log why, and let them be learned anew."""
        try:
            if self.monitor is not None:
                self.monitor.load_state_dict(saved)
        except UsageError as error:
            self._warn(f"the checkpoint's reference values are not used: {error} They are learned anew.")

    def end(self, error: BaseException | None = None) -> None:
        """Detach, if attached; ``error`` is what training raised, whose state the run log keeps."""
        if self.monitor is not None:
            self.monitor.__exit__(type(error) if error is not None else None, error, None)

    @property
    def attached(self) -> bool:
        """True while a training is watched."""
        return self.monitor is not None and self.monitor.attached

    @property
    def verdict(self) -> str:
        """The verdict of the run at the last change of an incident."""
        return self._news.verdict

    # What the trainer asks.

    def wants_stop(self) -> bool:
        """Return whether the training is to end, and log why, once. Nothing on a device is waited for."""
        if self._news.verdict not in self._stops or not self.attached:
            return False
        if not self._stop_told:
            self._stop_told = True
            assert self.monitor is not None
            worst = next((str(one) for one in reversed(self.monitor.incidents) if one.open), "")
            self._warn(f"training is ended, because the run is {self._news.verdict}: {worst}")
        return True

    def refuses(self, checkpoint: str) -> bool:
        """Return whether the model is not worth a checkpoint now, and log why, once for each name of a ``checkpoint``."""
        if self.monitor is None or not self.monitor.attached:
            return False
        guard = self.monitor.checkpoint_guard()
        if not guard and checkpoint != self._refused:
            self._refused = checkpoint
            self._warn(f"{checkpoint} is not saved: {guard.reason}")
        return not guard

    def state(self) -> dict[str, Any]:
        """Return the reference values of the run for a checkpoint; empty before the first training."""
        return self.monitor.state_dict() if self.monitor is not None else {}

    def write(self, file: Path) -> None:
        """Write the reference values of the run into a checkpoint."""
        file.write_text(json.dumps(self.state()), encoding="utf-8")

    # What the trainer's logger gets.

    def numbers(self, scaler: Any = None) -> dict[str, float]:
        """Return the numbers of the last step by name; empty before the first.

        Args:
            scaler: gradient scaler, whose scale is read on the host; None: there is none.
        """
        if self.monitor is None or not self.monitor.history.rows:
            return {}
        snapshot = self.monitor.snapshot()
        told = scalars_of(snapshot, self._worst)
        absent = np.flatnonzero(np.isnan(snapshot.grad_norm) & (snapshot.nonfinite == 0))
        for column in absent.tolist():  # a layer without a gradient has no norm; NaN would say that it is not finite
            told.pop(f"{self.root}gradient_norm/{snapshot.layers[column]}", None)
        if scaler is not None and scaler.is_enabled():
            told[f"{self.root}loss_scale"] = float(scaler.get_scale())
        return told

    def texts(self) -> dict[str, str]:
        """Return what changed since the last call, as text by name: incidents, and the verdict."""
        changed = self._news.take()
        told = {f"{self.root}incidents": text_of(changed)} if changed else {}
        if self._news.verdict != self._verdict_logged and self.monitor is not None and self.monitor.history.rows:
            self._verdict_logged = told[f"{self.root}verdict"] = self._news.verdict
        return told

    def _warn(self, text: str) -> None:
        text = f"gradwatch: {text}"
        if _log.hasHandlers():
            _log.warning("%s", printable(text))
        else:  # logging itself would write over a progress bar
            write_line(text)


def read(file: Path) -> dict[str, Any] | None:
    """Return what `Session.write` wrote into a checkpoint; None if it is not there, empty if it is damaged."""
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # the process was killed while it wrote
        return {}
    return saved if isinstance(saved, dict) else {}


def automatic() -> str:
    """Return the name of the report that leaves the trainer's progress bar alone: a card has a place of its own."""
    return "notebook" if is_notebook() else "log"


def _beside_bars(report: Any) -> list[Any]:
    """Return the reports as a list, with a card in a notebook and log lines elsewhere for ``"auto"``.

    Raises:
        UsageError: a live view is asked for.
    """
    asked = list(report) if isinstance(report, (list, tuple)) else [] if report is None else [report]
    if "live" in asked:
        raise UsageError(
            "report='live' draws where the trainer draws its own progress bar. Leave it out for log lines, or give a log= and "
            "look at it with `gradwatch watch` in another terminal."
        )
    return [automatic() if isinstance(one, str) and one == "auto" else one for one in asked]


class Ends(Protocol):
    """A callback that must be told how a training ended, since its framework has no event for one that raises."""

    def training_over(self, error: BaseException | None) -> None:
        """End what was attached; ``error`` is what the training raised, if it did."""


@contextmanager
def told_of_the_end(callbacks: Sequence[Ends]) -> Iterator[None]:
    """Tell the callbacks when the training inside is over, also if it raises."""
    try:
        yield
    except BaseException as error:
        for one in callbacks:
            one.training_over(error)
        raise
    for one in callbacks:
        one.training_over(None)
