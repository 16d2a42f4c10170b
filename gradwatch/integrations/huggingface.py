"""gradwatch in the Trainer of Hugging Face transformers, and in trainers built on it, such as those of TRL."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.integrations.session import Session, read, told_of_the_end
from gradwatch.integrations.versions import framework

if TYPE_CHECKING:
    from typing import Unpack

    from gradwatch.integrations.session import Settings, StopOn
    from gradwatch.monitor import Monitor

framework("transformers", "5.0", needs="Trainer.train")
import transformers  # noqa: E402  the line above says so if it cannot be imported

_SAVED = "gradwatch.json"
_DRAW = (transformers.ProgressCallback, transformers.PrinterCallback)


class _OffTheBar(transformers.TrainerCallback):  # type: ignore[misc]
    """Takes the numbers of gradwatch out of the logs before they are printed, after loggers have had them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in [name for name in logs or () if name.startswith("gradwatch/")]:
            del logs[name]


class GradwatchCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Watches the trainings of a `transformers.Trainer`: ``Trainer(..., callbacks=[GradwatchCallback()])``.

    It attaches when training begins and detaches when it ends or raises. At each logging step it adds its numbers to the logs of
    the Trainer, with the incidents that changed as text. A checkpoint of a model that is not worth keeping is not saved, and the
    reason is logged as a warning. Each checkpoint contains the reference values of the run, with which a resumed run goes on.

    Args:
        stop_on: ``"suspected"`` or ``"confirmed"``: the verdict at which training is ended, as by ``should_training_stop``. None:
            it is never ended.
        worst: number of layers closest to their limits whose gradient norms are logged.
        settings: arguments of `gradwatch.attach` other than the model. By default, the report is a card in a
            notebook, and log lines elsewhere.

    Raises:
        UsageError: an argument is unknown or invalid.
    """

    def __init__(self, *, stop_on: StopOn | None = None, worst: int = 5, **settings: Unpack[Settings]) -> None:
        self._session = Session(stop_on, worst, settings)
        self._trainer: Any = None
        self._quiet = _OffTheBar()
        self._saved: dict[str, Any] | None = None
        _tell_of_ends()

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the current or last training; None before the first one."""
        return self._session.monitor

    def trains(self, trainer: Any, checkpoint: str | None) -> None:
        """Prepare for a training of ``trainer``, which resumes from the folder ``checkpoint`` unless that is None."""
        self._trainer, self._saved = trainer, None
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(
            self
        )  # logs are changed before loggers see them, and saving is decided after the Trainer's own rule
        flow = [isinstance(one, transformers.trainer_callback.DefaultFlowCallback) for one in callbacks]
        callbacks.insert(flow.index(True) + 1 if True in flow else 0, self)
        drawn = [isinstance(one, _DRAW) for one in callbacks]
        if True in drawn:
            callbacks.insert(drawn.index(True), self._quiet)
        if hasattr(trainer, "_determine_best_metric"):
            trainer._determine_best_metric = functools.partial(self._is_best, trainer, trainer._determine_best_metric)
        if checkpoint is not None:
            self._saved = read(Path(checkpoint, _SAVED))

    def training_over(self, error: BaseException | None) -> None:
        """Detach; ``error`` is what the training raised."""
        self._session.end(error)
        self._trainer.__dict__.pop("_determine_best_metric", None)
        callbacks = self._trainer.callback_handler.callbacks
        callbacks[:] = [one for one in callbacks if one is not self._quiet]
        self._trainer = None

    def _is_best(self, trainer: Any, judge: Any, *args: Any, **kwargs: Any) -> bool:
        """Return whether the Trainer takes the model for its best; one that is not worth a checkpoint never is."""
        # whether to save the best model is decided after the last event at which a callback could refuse it
        name = f"checkpoint-{trainer.state.global_step}"
        refused = trainer.args.metric_for_best_model is not None and self._session.refuses(f"{name}, if the best,")
        return not refused and judge(*args, **kwargs)

    # Called by the Trainer.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach to the model."""
        self._session.begin(model, self._saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the training at the verdict ``stop_on``, after logging this step; refuse a checkpoint that is due."""
        if self._session.wants_stop():
            control.should_training_stop = control.should_log = True
        self._refuse(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a checkpoint that is due."""
        self._refuse(state, control)

    def _refuse(self, state: Any, control: Any) -> None:
        if control.should_save and self._session.refuses(f"checkpoint-{state.global_step}"):
            control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the numbers of the last step to the logs of a training step, and what changed to those of its end."""
        if logs is None or not self._session.attached or not {"loss", "train_loss"} & logs.keys():
            return
        told: dict[str, Any] = {}
        if "loss" in logs:
            accelerator = getattr(self._trainer, "accelerator", None)
            told |= self._session.numbers(getattr(accelerator, "scaler", None))
        told |= self._session.texts()
        logs.update(told)
        if state.log_history:  # the Trainer has copied the logs there already
            state.log_history[-1].update(told)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the reference values of the run into the checkpoint that was just saved."""
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and checkpoint.is_dir() and self._session.attached:
            self._session.write(checkpoint / _SAVED)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self._session.end()


def _tell_of_ends() -> None:
    """Wrap `Trainer.train`, once, so that callbacks know which Trainer trains, and of a training that raises.

    The Trainer has no event for either.
    """
    original = transformers.Trainer.train
    if hasattr(original, "gradwatch"):
        return

    @functools.wraps(original)
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        mine = [one for one in trainer.callback_handler.callbacks if isinstance(one, GradwatchCallback)]
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = transformers.trainer_utils.get_last_checkpoint(trainer.args.output_dir)
        for one in mine:
            one.trains(trainer, checkpoint)
        with told_of_the_end(mine):
            return original(trainer, resume_from_checkpoint, *args, **kwargs)

    train.gradwatch = True  # type: ignore[attr-defined]
    transformers.Trainer.train = train
