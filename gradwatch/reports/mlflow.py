"""Metrics and incidents for MLflow."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.scalars import scalars_of, text_of

if TYPE_CHECKING:
    from typing import Any

    from gradwatch.records import Snapshot

_FORBIDDEN = re.compile(r"[^\w\-. /]")


class MLflow(Report):
    """Logs the global norm, the clip coefficient and the layers closest to their limits, and incidents as an artifact.

    Metrics are logged at most every five seconds by a thread of MLflow. When an incident changes, that thread is waited for
    and the artifact ``gradwatch/incidents.md`` is written.

    Args:
        run_id: id of the run; None: the run that is active at the first step.
        worst: number of layers to log.
        client: an `mlflow.MlflowClient`; None: a new one for the current tracking server.
    """

    period: ClassVar[float] = 5.0

    def __init__(self, run_id: str | None = None, worst: int = 5, client: Any = None) -> None:
        self._run_id = run_id
        self._worst = worst
        self._client = client
        self._sent: deque[Any] = deque(maxlen=32)  # earlier ones have been sent long ago

    def step(self, snapshot: Snapshot) -> None:
        """Log the numbers of the current step, and all incidents if one changed."""
        client = self._connected()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_FORBIDDEN.sub("_", name), value, now, snapshot.step)
            for name, value in scalars_of(snapshot, self._worst).items()
        ]
        self._sent.append(client.log_batch(self._run_id, metrics=metrics, synchronous=False))
        if snapshot.news:
            self._wait()  # a file store cannot be read while it is written
            client.log_text(self._run_id, text_of(snapshot.incidents), "gradwatch/incidents.md")

    def close(self, snapshot: Snapshot) -> None:
        """Log the last step and the verdict, and wait until everything is sent."""
        if snapshot.step < 0:
            return
        self.step(snapshot)
        self._wait()
        self._client.set_tag(self._run_id, "gradwatch.verdict", snapshot.verdict)

    def _wait(self) -> None:
        while self._sent:
            self._sent.popleft().wait()

    def _connected(self) -> Any:
        try:
            import mlflow
        except ImportError:
            raise UsageError("mlflow is not installed: pip install 'gradwatch[mlflow]'") from None
        if self._run_id is None:
            run = mlflow.active_run()
            if run is None:
                raise UsageError("There is no active MLflow run: call mlflow.start_run() before the first step.")
            self._run_id = run.info.run_id
        if self._client is None:
            self._client = mlflow.MlflowClient()
        return self._client
