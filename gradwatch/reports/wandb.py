"""Scalars and incidents for Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.scalars import scalars_of, text_of
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from typing import Any

    from gradwatch.records import Snapshot


class WeightsAndBiases(Report):
    """Logs the global norm, the clip coefficient and the layers closest to their limits, and incidents in the run's summary.

    Numbers are logged at most once a second, without committing them. They are added to the row that your next ``run.log``, or
    the end of the run, commits, so the steps of the run are not affected.

    Args:
        run: a run of `wandb.init`; None: the run that is active at the first step.
        worst: number of layers to log.
        alert: whether to also send `run.alert` when an incident changes that is more than a notice.
    """

    period: ClassVar[float] = 1.0

    def __init__(self, run: Any = None, worst: int = 5, *, alert: bool = False) -> None:
        self._run = run
        self._worst = worst
        self._alert = alert
        self._defined = False

    def step(self, snapshot: Snapshot) -> None:
        """Log the numbers of the current step, and all incidents if one changed."""
        run = self._active()
        if not self._defined:
            run.define_metric("gradwatch/step", hidden=True)
            run.define_metric("gradwatch/*", step_metric="gradwatch/step")
            self._defined = True
        run.log({**scalars_of(snapshot, self._worst), "gradwatch/step": snapshot.step}, commit=False)
        if snapshot.news:
            run.summary["gradwatch/incidents"] = text_of(snapshot.incidents)
            grave = [one for one in snapshot.news if one.severity != "notice"]
            if self._alert and grave:
                run.alert(title=printable(f"gradwatch: {grave[0]}"), text=text_of(grave))

    def close(self, snapshot: Snapshot) -> None:
        """Log the last step and the verdict."""
        if snapshot.step >= 0:
            self.step(snapshot)
            self._active().summary["gradwatch/verdict"] = snapshot.verdict

    def _active(self) -> Any:
        if self._run is None:
            try:
                import wandb
            except ImportError:
                raise UsageError("wandb is not installed: pip install 'gradwatch[wandb]'") from None
            self._run = wandb.run
            if self._run is None:
                raise UsageError("There is no active Weights & Biases run: call wandb.init() before the first step.")
        return self._run
