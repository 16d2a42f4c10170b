"""gradwatch in training loops with an Accelerator of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.errors import UsageError, shown
from gradwatch.integrations.session import Session, read
from gradwatch.integrations.versions import framework

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Unpack

    from torch import nn

    from gradwatch.integrations.session import Settings, StopOn
    from gradwatch.monitor import Monitor

framework("accelerate", "1.10", needs="Accelerator.save_state")
import accelerate  # noqa: E402  the line above says so if it cannot be imported


class GradwatchMonitor:
    """Watches a model in a loop with an `accelerate.Accelerator`, until the end of the ``with`` block.

    ```python
    with GradwatchMonitor(accelerator, model, stop_on="confirmed") as watched:
        for step, batch in enumerate(loader):
            ...
            accelerator.log({"loss": loss.item()} | watched.logs(), step=step)
            if watched.should_stop:
                break
            if step % 1000 == 0 and watched.is_worth_saving(f"step {step}"):
                accelerator.save_state(folder)
    ```

    The loop is yours, so it logs, stops and saves itself. `Accelerator.save_state` keeps the reference values of the run in each
    checkpoint, and `Accelerator.load_state` inside the block restores them.

    Args:
        accelerator: the accelerator.
        model: the model, as `Accelerator.prepare` returned it.
        stop_on: ``"suspected"`` or ``"confirmed"``: the verdict at which `should_stop` is true; None: it never is.
        worst: number of layers closest to their limits whose gradient norms are in `logs`.
        settings: arguments of `gradwatch.attach` other than the model. By default, the report is a card in a
            notebook, and log lines elsewhere.

    Raises:
        UsageError, RunLogError: an argument is invalid. Nothing is left attached.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        *,
        stop_on: StopOn | None = None,
        worst: int = 5,
        **settings: Unpack[Settings],
    ) -> None:
        if not isinstance(accelerator, accelerate.Accelerator):
            raise UsageError(f"GradwatchMonitor() got {shown(accelerator)}; expected an accelerate.Accelerator.")
        self._session = Session(stop_on, worst, settings)
        self._accelerator = accelerator
        self._session.begin(model)
        number = next((index for index, one in enumerate(accelerator._models) if one is model), 0)
        self._file = f"gradwatch_{number}.json" if number else "gradwatch.json"  # as Accelerate names those of models
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    @property
    def monitor(self) -> Monitor:
        """The monitor."""
        assert self._session.monitor is not None
        return self._session.monitor

    def __enter__(self) -> GradwatchMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach(error)

    def detach(self, error: BaseException | None = None) -> None:
        """Detach, as at the end of the ``with`` block; ``error`` is what the training raised."""
        for hook in self._hooks:
            hook.remove()
        self._session.end(error)

    def logs(self) -> dict[str, float | str]:
        """Return the numbers of the last step by name, and as text what changed since the last call, for `Accelerator.log`."""
        return {**self._session.numbers(self._accelerator.scaler), **self._session.texts()}

    @property
    def should_stop(self) -> bool:
        """True from the verdict ``stop_on`` on. It is the same in all processes, and does not wait for a device."""
        return self._session.wants_stop()

    def is_worth_saving(self, name: str = "the checkpoint") -> bool:
        """Return whether the model is worth a checkpoint; if not, log why. It is the same in all processes.

        Reads all weights, as `gradwatch.Monitor.checkpoint_guard`. ``name`` is the name of the checkpoint in the warning.
        """
        return not self._session.refuses(name)

    # Called by the accelerator.

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        if self._accelerator.is_main_process:
            self._session.write(Path(folder, self._file))

    def _load(self, models: Any, folder: str) -> None:
        saved = read(Path(folder, self._file))
        if saved is not None:
            self._session.resume(saved)
