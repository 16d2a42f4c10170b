"""Metrics and incidents for MLflow."""

from __future__ import annotations

import re
import time
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.outbox import Outbox
from gradwatch.reports.scalars import NamedRows, root_of, standing_of, text_of
from gradwatch.text.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from gradwatch.records import Scalars, Snapshot

_BATCH = 900  # metrics; a server takes up to 1,000 at once
_WAITING = 256  # batches, which take some 50 MB
_FORBIDDEN = re.compile(r"[^\w\-. /]")


class MLflow(Report):
    """Logs the numbers of every recorded step, how the layers stand every five seconds, and incidents as an artifact.

    The numbers are the loss, the global norm before and after clipping, the clip coefficient, the learning rate and the loss
    scale. They are sent in batches by a thread, as is the artifact ``gradwatch/incidents.md``: training does not wait for the
    server. The times of the steps in a batch are evenly spaced. If the server is so slow that 256 batches wait, further ones are
    left out, and the tag ``gradwatch.batches_left_out`` says how many.

    Args:
        run_id: id of the run; None: the run that is active at the first step.
        worst: number of layers to log.
        client: an `mlflow.MlflowClient`; None: a new one for the current tracking server.

    Raises:
        UsageError: mlflow is not installed.
    """

    takes_rows: ClassVar[bool] = True
    period: ClassVar[float] = 5.0

    def __init__(self, run_id: str | None = None, worst: int = 5, client: Any = None) -> None:
        if find_spec("mlflow") is None:
            raise UsageError(missing("The report", "mlflow", "mlflow"))
        self._run_id = run_id
        self._worst = worst
        self._client = client
        self._root = ""
        self._start()

    def _start(self) -> None:
        self._outbox = Outbox(_WAITING)
        self._named = NamedRows(time.time(), self._root)
        self._metrics: list[Any] = []
        self._left_out = 0

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Take the name of the model, which stands in all names."""
        self._root = _FORBIDDEN.sub("_", root_of(now().facts.name))

    def start(self) -> None:
        """Begin a run now."""
        self._start()

    def rows(self, rows: Scalars) -> None:
        """Log the numbers of each row, once there are enough of them for a batch."""
        for step, when, told in self._named.of(rows, time.time()):
            self._add(told, step, when)

    def step(self, snapshot: Snapshot) -> None:
        """Log how the layers stand at the current step, and all incidents if one changed."""
        self._add(standing_of(snapshot, self._worst), snapshot.step, time.time())
        self._send_metrics()
        if snapshot.news:
            text = text_of(snapshot.incidents)
            self._put(partial(self._connected().log_text, self._run_id, text, f"{self._root}incidents.md"))

    def close(self, snapshot: Snapshot) -> None:
        """Log the last step and the verdict, and wait until everything is sent."""
        if snapshot.step < 0:
            return
        self.step(snapshot)
        self._outbox.close()
        self._client.set_tag(self._run_id, self._tag("verdict"), snapshot.verdict)
        if self._left_out:
            self._client.set_tag(self._run_id, self._tag("batches_left_out"), str(self._left_out))

    def abandon(self) -> None:
        """End the thread."""
        self._outbox.abandon()

    def _add(self, told: Mapping[str, float], step: int, when: float) -> None:
        self._connected()
        from mlflow.entities import Metric

        stamp = int(1000 * when)
        self._metrics += [Metric(_FORBIDDEN.sub("_", name), value, stamp, step) for name, value in told.items()]
        while len(self._metrics) >= _BATCH:
            self._send_metrics()

    def _tag(self, name: str) -> str:
        return f"{self._root}{name}".replace("/", ".")

    def _send_metrics(self) -> None:
        batch, self._metrics = self._metrics[:_BATCH], self._metrics[_BATCH:]
        self._put(partial(self._connected().log_batch, self._run_id, metrics=batch))

    def _put(self, work: Callable[[], object]) -> None:
        self._left_out += not self._outbox.put(work)

    def _connected(self) -> Any:
        import mlflow

        if self._run_id is None:
            run = mlflow.active_run()
            if run is None:
                raise UsageError("There is no active MLflow run: call mlflow.start_run() before the first step.")
            self._run_id = run.info.run_id
        if self._client is None:
            self._client = mlflow.MlflowClient()
        return self._client
