"""Scalars and incidents for Weights & Biases."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.scalars import NamedRows, root_of, standing_of, text_of
from gradwatch.text.extras import missing
from gradwatch.text.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from gradwatch.records import Scalars, Snapshot


class WeightsAndBiases(Report):
    """Logs the numbers of recorded steps and of the layers closest to their limits, and incidents in the run's summary.

    The numbers are the loss, the global norm before and after clipping, the clip coefficient, the learning rate and the loss
    scale, over ``gradwatch/step``. By default, those of the last step are logged once a second without committing them. They are
    added to the row that your next ``run.log``, or the end of the run, commits. So the run keeps its steps: there is
    no room for rows between those of your own ``run.log(..., step=n)``.

    Args:
        run: a run of `wandb.init`; None: the run that is active at the first step.
        worst: number of layers to log.
        every_step: whether to commit a row for every recorded step, in batches. The steps of the run then count these rows too,
            and Weights & Biases drops what is logged with a smaller ``step=`` than it has reached: use it if you do not pass
            ``step=`` to ``run.log``, as the loggers of Lightning and transformers do not.
        alert: whether to also send `run.alert` when an incident changes that is more than a notice.

    Raises:
        UsageError: there is no run, and wandb is not installed.
    """

    takes_rows: ClassVar[bool] = True
    period: ClassVar[float] = 1.0

    def __init__(self, run: Any = None, worst: int = 5, *, every_step: bool = False, alert: bool = False) -> None:
        if run is None and find_spec("wandb") is None:
            raise UsageError(missing("The report", "wandb", "wandb"))
        self._run = run
        self._worst = worst
        self._every_step = every_step
        self._alert = alert
        self._root = ""
        self._named = NamedRows(time.time(), self._root)
        self._last: dict[str, float] = {}
        self._defined = False

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Take the name of the model, which stands in all names."""
        self._root = root_of(now().facts.name)

    def start(self) -> None:
        """Begin a run now."""
        self._named, self._last = NamedRows(time.time(), self._root), {}

    def rows(self, rows: Scalars) -> None:
        """Log the numbers of each row, or keep those of the last one for the next call of `step`."""
        run = self._active()
        for step, _, told in self._named.of(rows, time.time()):
            if self._every_step and self._last:
                run.log(self._last)
            self._last = {**told, f"{self._root}step": step}

    def step(self, snapshot: Snapshot) -> None:
        """Log the numbers of the current step, and all incidents if one changed."""
        run = self._active()
        standing = standing_of(snapshot, self._worst)
        told, self._last = {**self._last, **standing, f"{self._root}step": snapshot.step}, {}
        run.log(told, commit=self._every_step)
        if snapshot.news:
            run.summary[f"{self._root}incidents"] = text_of(snapshot.incidents)
            grave = [one for one in snapshot.news if one.severity != "notice"]
            if self._alert and grave:
                run.alert(title=printable(f"{self._root[:-1]}: {grave[0]}"), text=text_of(grave))

    def close(self, snapshot: Snapshot) -> None:
        """Log the last step and the verdict."""
        if snapshot.step >= 0:
            self.step(snapshot)
            self._active().summary[f"{self._root}verdict"] = snapshot.verdict

    def _active(self) -> Any:
        if self._run is None:
            import wandb

            self._run = wandb.run
            if self._run is None:
                raise UsageError("There is no active Weights & Biases run: call wandb.init() before the first step.")
        if not self._defined:
            self._run.define_metric(f"{self._root}step", hidden=True)
            self._run.define_metric(f"{self._root}*", step_metric=f"{self._root}step")
            self._defined = True
        return self._run
