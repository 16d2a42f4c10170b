"""gradwatch in the Trainer of Lightning."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from gradwatch.integrations.session import Session
from gradwatch.integrations.versions import framework

if TYPE_CHECKING:
    from typing import Unpack

    from gradwatch.integrations.session import Settings, StopOn
    from gradwatch.monitor import Monitor

framework("lightning.pytorch", "2.6", needs="Callback.on_exception")
import lightning.pytorch as pl  # noqa: E402  the line above says so if it cannot be imported

# what a ModelCheckpoint calls once a checkpoint is due, before it changes its list of the best
_SAVES = ("_save_topk_checkpoint", "_save_last_checkpoint")


class GradwatchCallback(pl.Callback):  # type: ignore[misc]
    """Watches the trainings of a Lightning `Trainer`: ``Trainer(..., callbacks=[GradwatchCallback()])``.

    It attaches when training begins and detaches when `fit` ends or raises. Every ``log_every_n_steps`` it logs its numbers into
    the loggers of the Trainer, and incidents that changed as text. A `ModelCheckpoint` saves no model that is not worth keeping,
    and the reason is logged as a warning. Each checkpoint contains the reference values of the run, with which a resumed run goes
    on.

    Args:
        stop_on: ``"suspected"`` or ``"confirmed"``: the verdict at which training is ended, as by ``trainer.should_stop``. None:
            it is never ended.
        worst: number of layers closest to their limits whose gradient norms are logged.
        settings: arguments of `gradwatch.attach` other than the model. The report is log lines by default.

    Raises:
        UsageError: an argument is unknown or invalid.
    """

    def __init__(self, *, stop_on: StopOn | None = None, worst: int = 5, **settings: Unpack[Settings]) -> None:
        super().__init__()
        if settings.get("report", "auto") == "auto":  # in a notebook, rich's bar draws over what is displayed meanwhile
            settings["report"] = "log"
        self._session = Session(stop_on, worst, settings)
        self._saved: dict[str, Any] | None = None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the current or last training; None before the first one."""
        return self._session.monitor

    # Called by the Trainer.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the model as the strategy has wrapped it."""
        self._session.begin(trainer.model, self._saved)
        self._saved = None
        for checkpoint in trainer.checkpoint_callbacks:
            for name in _SAVES:
                if hasattr(checkpoint, name):
                    setattr(checkpoint, name, functools.partial(self._save, trainer, getattr(checkpoint, name)))

    def _save(self, trainer: Any, save: Any, *args: Any, **kwargs: Any) -> Any:
        if self._session.refuses(f"the checkpoint of step {trainer.global_step}"):
            return None
        return save(*args, **kwargs)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log if it is time to, and end the training at the verdict ``stop_on``, after logging this step."""
        stops = self._session.wants_stop() and not trainer.should_stop
        trainer.should_stop = trainer.should_stop or stops
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # by which Lightning logs too
        if not trainer.is_global_zero or trainer.fit_loop._should_accumulate():
            return
        if trainer.log_every_n_steps and (stops or (step + 1) % trainer.log_every_n_steps == 0):
            numbers = self._session.numbers(trainer.scaler)
            for logger in trainer.loggers if numbers else ():
                logger.log_metrics(numbers, step=step)
        texts = self._session.texts()
        for logger in trainer.loggers if texts else ():
            _log_texts(logger, texts, step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach because training raised."""
        self._end(trainer, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach after `fit`."""
        self._end(trainer)

    def _end(self, trainer: Any, error: BaseException | None = None) -> None:
        for checkpoint in trainer.checkpoint_callbacks:
            for name in _SAVES:
                vars(checkpoint).pop(name, None)
        self._session.end(error)

    def state_dict(self) -> dict[str, Any]:
        """Return the reference values of the run, which Lightning keeps in its checkpoint."""
        return self._session.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the reference values of a checkpoint until training begins."""
        self._saved = state_dict


def _log_texts(logger: Any, texts: dict[str, str], step: int) -> None:
    """Log texts, for which loggers have no common method; one that cannot take texts gets none."""
    experiment = logger.experiment
    if hasattr(experiment, "add_text"):  # TensorBoard
        for name, text in texts.items():
            experiment.add_text(name, text, step)
    elif hasattr(experiment, "log_text"):  # the client of MLflow
        for name, text in texts.items():
            experiment.log_text(logger.run_id, text, f"{name}-{step}.md")
    elif type(logger).__name__ in ("CSVLogger", "WandbLogger"):
        logger.log_metrics(texts, step=step)
