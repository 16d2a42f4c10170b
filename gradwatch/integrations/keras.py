"""gradwatch in `fit` of Keras 3 on its torch backend."""

from __future__ import annotations

import functools
import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.errors import IntegrationError
from gradwatch.integrations.session import Session, automatic, read, told_of_the_end
from gradwatch.integrations.versions import framework
from gradwatch.reports.log import LogReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from gradwatch.integrations.session import Settings, StopOn
    from gradwatch.monitor import Monitor
    from gradwatch.records import Snapshot

framework("keras", "3.10", needs="optimizers.Optimizer._clip_gradients")
import keras  # noqa: E402  the line above says so if it cannot be imported

if keras.config.backend() != "torch":
    raise IntegrationError(
        f"Keras runs on its {keras.config.backend()} backend; gradwatch watches torch. Set the environment variable "
        "KERAS_BACKEND=torch before keras is imported."
    )

_NUMBERS = ("global_norm", "global_norm_after_clip", "clip_coefficient", "loss_scale", "open_incidents")
_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
_SAVE = "_save_model"  # what a callback that saves calls once a checkpoint is due


class _OffTheBar(keras.callbacks.Callback):  # type: ignore[misc]
    """Takes the numbers of gradwatch out of the logs before the progress bar shows them, after all loggers have had them."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for name in [name for name in logs or () if name.startswith("gradwatch/")]:
            del logs[name]


class _Lines(LogReport):
    """Log lines that begin below the progress bar of Keras, whose line has no end yet."""

    def step(self, snapshot: Snapshot) -> None:
        self._inside_a_line = True
        super().step(snapshot)
        self._inside_a_line = False

    def _write(self, text: str) -> None:
        if self._inside_a_line:
            super()._write("")
        self._inside_a_line = False
        super()._write(text)

    _inside_a_line = False


class GradwatchCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Watches `Model.fit`: ``model.fit(..., callbacks=[GradwatchCallback()])``.

    It attaches when training begins and detaches when it ends or raises. The row of a step has the gradients that the optimizer
    of Keras uses: of all accumulated batches, without the loss scale, before and after its own clip. At the end of each epoch the
    numbers of its last step are added to its logs, which every logger of Keras gets, and incidents, verdict and worst layers as
    text to the history that `fit` returns. `ModelCheckpoint` and `BackupAndRestore` save no model that is not worth keeping; the
    reason is logged as a warning. Beside each file that they save, the reference values of the run are kept in a second one,
    whose name ends in ``.gradwatch.json``.

    Args:
        stop_on: ``"suspected"`` or ``"confirmed"``: the verdict at which training is ended, as by ``stop_training``. None: it is
            never ended.
        worst: number of layers closest to their limits whose gradient norms are in the history.
        resume: file that a `ModelCheckpoint` saved and whose training goes on. None: training starts anew, or where
            `BackupAndRestore` restores it.
        settings: arguments of `gradwatch.attach` other than the model. By default, the report is a card in a
            notebook, and log lines elsewhere.

    Raises:
        UsageError: an argument is unknown or invalid.
    """

    def __init__(
        self,
        *,
        stop_on: StopOn | None = None,
        worst: int = 5,
        resume: str | os.PathLike[str] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__()
        named = settings.get("report", "auto")
        if (automatic() if named == "auto" else named) == "log":
            settings["report"] = _Lines()
        self._session = Session(stop_on, worst, settings)
        self._resume = Path(resume) if resume is not None else None
        self._saving: list[Any] = []
        self._taps: _Taps | None = None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the current or last training; None before the first one."""
        return self._session.monitor

    def trains(self, others: list[Any]) -> None:
        """Prepare for a training with the callbacks ``others``, those of Keras that save among them."""
        self._saving = [one for one in others if isinstance(one, _SAVING) and hasattr(one, _SAVE)]

    def training_over(self, error: BaseException | None) -> None:
        """Detach; ``error`` is what the training raised."""
        for one in self._saving:
            vars(one).pop(_SAVE, None)
        self._saving = []
        if self._taps is not None:
            self._taps.remove()
        self._taps = None
        self._session.end(error)

    # Called by Keras.

    def on_train_begin(self, logs: Any = None) -> None:
        """Attach to the model and its optimizer."""
        backups = [file for one in self._saving if (file := _backup_of(one)) is not None]
        saved = next((found for file in (self._resume, *backups) if file and (found := read(_beside(file)))), None)
        self._session.begin(self.model)
        assert self.monitor is not None
        if saved is not None:
            self._session.resume(_renamed(saved, self.monitor.history.layers))
        self._taps = _Taps(self.model.optimizer, self.monitor)
        for one in self._saving:
            setattr(one, _SAVE, functools.partial(self._save, one, getattr(one, _SAVE)))

    def _save(self, callback: Any, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        file = _backup_of(callback) or Path(callback._get_file_path(*args, **kwargs))
        if self._session.refuses(str(file)):
            return
        before = _changed_at(file)
        save(*args, **kwargs)
        if _changed_at(file) != before:
            self._session.write(_beside(file))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """End the training at the verdict ``stop_on``."""
        if self._session.wants_stop():
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add the numbers of the last step to the logs, and texts to the history."""
        if logs is None or not self._session.attached:
            return
        told = self._session.numbers(self._taps)
        # each epoch has the same names, because loggers of Keras make columns of the first one's
        root = self._session.root
        logs.update({root + name: told.get(root + name, math.nan) for name in _NUMBERS})
        norm = f"{root}gradient_norm/"
        worst = ", ".join(f"{name[len(norm) :]} {value:.3g}" for name, value in told.items() if name.startswith(norm))
        texts = {f"{root}incidents": "", **self._session.texts(), f"{root}worst_layers": worst}
        texts[f"{root}verdict"] = self._session.verdict
        for name, text in texts.items():
            self.model.history.history.setdefault(name, []).append(text)

    def on_train_end(self, logs: Any = None) -> None:
        """Detach."""
        self.training_over(None)


class _Taps:
    """Three methods of an optimizer of Keras, replaced while it is watched: gradients never lie in `.grad` as it uses them.

    Args:
        optimizer: optimizer of the model; its inner one if it scales the loss.
        monitor: monitor of the training.
    """

    def __init__(self, optimizer: Any, monitor: Monitor) -> None:
        self._outer, self._monitor = optimizer, monitor
        self._inner = getattr(optimizer, "inner_optimizer", optimizer)
        self._loss: Any = None
        self._losses: list[Any] = []
        self._variables: Any = ()
        self._replaced: list[tuple[Any, str]] = []
        self._replace(self._outer, "scale_loss", self._scale_loss)
        self._replace(self._inner, "_backend_apply_gradients", self._apply)
        self._replace(self._inner, "_clip_gradients", self._clip)

    def _replace(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return by(original, *args, **kwargs)

        # Keras tracks what is assigned to an optimizer in the usual way
        object.__setattr__(owner, name, torch.compiler.disable(replacement))
        self._replaced.append((owner, name))

    def remove(self) -> None:
        """Restore the methods."""
        for owner, name in self._replaced:
            vars(owner).pop(name, None)
        self._losses.clear()
        self._loss = None

    def is_enabled(self) -> bool:
        """Return whether the loss is scaled, as `torch.amp.GradScaler.is_enabled`."""
        return self._outer is not self._inner or self._inner.loss_scale_factor is not None

    def get_scale(self) -> float:
        """Return the loss scale, which waits for its device."""
        scale = self._outer.dynamic_scale if self._outer is not self._inner else self._inner.loss_scale_factor
        return float(scale)

    def _scale_loss(self, original: Callable[..., Any], loss: Any) -> Any:
        self._loss = loss.detach() / (self._inner.gradient_accumulation_steps or 1)
        return original(loss)

    def _apply(self, original: Callable[..., Any], gradients: Any, variables: Any) -> Any:
        if self._loss is not None:  # that of a step which the loss scale leaves out never gets here
            self._losses.append(self._loss)
        self._loss, self._variables = None, variables
        return original(gradients, variables)

    def _clip(self, original: Callable[..., Any], gradients: Any) -> Any:
        parameters = [variable.value for variable in self._variables]
        theirs = [parameter.grad for parameter in parameters]
        for loss in self._losses:
            self._monitor.loss(loss)
        self._losses.clear()
        clips = any(getattr(self._inner, name) for name in ("clipnorm", "global_clipnorm", "clipvalue"))
        used = [gradient.clone() for gradient in gradients] if clips else list(gradients)
        try:
            for parameter, gradient in zip(parameters, used, strict=True):
                parameter.grad = gradient
            if clips:
                self._monitor.clip_begins()
                torch._foreach_copy_(used, original(gradients))
            self._monitor.step()
        finally:
            for parameter, gradient in zip(parameters, theirs, strict=True):
                parameter.grad = gradient
        return used


def _renamed(saved: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Return a state with the names ``layers``, if it has the same ones: Keras drops the name of a model that it loads."""
    try:
        if [_tail(name) for name in saved["history"]["layers"]] == [_tail(name) for name in layers]:
            return {**saved, "history": {**saved["history"], "layers": list(layers)}}
    except (AttributeError, KeyError, TypeError):
        pass  # a damaged state is refused with a sentence where it is used
    return saved


def _tail(name: str) -> list[str]:
    """Return the names of layer and variable in the name of a parameter."""
    return name.rpartition("_torch_params.")[2].split("/")[-2:]


def _backup_of(callback: Any) -> Path | None:
    """Return the file in which a `BackupAndRestore` keeps the weights; None if the callback is none."""
    file = getattr(callback, "_weights_path", None)
    return Path(file) if file is not None else None


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.gradwatch.json")


def _changed_at(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _tell_of_ends() -> None:
    """Wrap `keras.Model.fit`, so that callbacks know the others, and of a training that raises: Keras has no event for either.

    It has to be wrapped before it is called: in ``model.fit(callbacks=[GradwatchCallback()])`` it is looked up before the
    callback is made.
    """
    original = keras.Model.fit
    form = inspect.signature(original)

    @functools.wraps(original)
    def fit(*args: Any, **kwargs: Any) -> Any:
        given = form.bind(*args, **kwargs)
        told = given.arguments.get("callbacks")
        listed = told.callbacks if isinstance(told, keras.callbacks.CallbackList) else told
        listed = list(listed) if isinstance(listed, (list, tuple)) else [] if listed is None else [listed]
        mine = [one for one in listed if isinstance(one, GradwatchCallback)]
        others = [one for one in listed if one not in mine]
        if mine and not isinstance(told, keras.callbacks.CallbackList):  # a list that is made already keeps its order
            if not any(isinstance(one, keras.callbacks.History) for one in others):
                others.append(keras.callbacks.History())
            given.arguments["callbacks"] = [*mine, *others, _OffTheBar()]
        for one in mine:
            one.trains(others)
        with told_of_the_end(mine):
            return original(*given.args, **given.kwargs)

    keras.Model.fit = fit


_tell_of_ends()
