"""Scalars and incidents for TensorBoard."""

from __future__ import annotations

import pkgutil
import time
from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.scalars import NamedRows, root_of, standing_of, text_of
from gradwatch.text.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from gradwatch.records import Scalars, Snapshot


class TensorBoard(Report):
    """Writes the numbers of every recorded step, the layers closest to their limits once a second, and incidents as text.

    The numbers are the loss, the global norm before and after clipping, the clip coefficient, the learning rate and the loss
    scale. They are written in batches; the times of the steps in a batch are evenly spaced.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` (or one of tensorboardX), which the user closes; None: a new one with
            default arguments, which writes below ``runs`` and is closed at the end.
        worst: number of layers to write.

    Raises:
        UsageError: there is no writer, and tensorboard is not installed.
    """

    takes_rows: ClassVar[bool] = True
    period: ClassVar[float] = 1.0

    def __init__(self, writer: Any = None, worst: int = 5) -> None:
        self._own = writer is None
        if writer is None:
            try:
                writer = pkgutil.resolve_name("torch.utils.tensorboard:SummaryWriter")()
            except ImportError:
                raise UsageError(missing("The report", "tensorboard", "tensorboard")) from None
        self._writer = writer
        self._worst = worst
        self._root = ""
        self._named = NamedRows(time.time(), self._root)

    def connect(self, now: Callable[[], Snapshot]) -> None:
        """Take the name of the model, which stands in all names."""
        self._root = root_of(now().facts.name)

    def start(self) -> None:
        """Begin a run now."""
        self._named = NamedRows(time.time(), self._root)

    def rows(self, rows: Scalars) -> None:
        """Write the numbers of each row."""
        for step, when, told in self._named.of(rows, time.time()):
            self._write(told, step, when)

    def _write(self, told: Mapping[str, float], step: int, when: float) -> None:
        """Write numbers of one step: as one event, which takes a third of the time of single ones, if the writer is torch's."""
        file = getattr(self._writer, "file_writer", None)
        if file is not None and type(file).__module__ == "torch.utils.tensorboard.writer":
            summary = pkgutil.resolve_name("tensorboard.compat.proto.summary_pb2:Summary")
            values = [summary.Value(tag=name, simple_value=value) for name, value in told.items()]
            file.add_summary(summary(value=values), step, when)
        else:
            for name, value in told.items():
                self._writer.add_scalar(name, value, step, when)

    def step(self, snapshot: Snapshot) -> None:
        """Write how the layers stand at the current step, and the incidents that changed as text."""
        self._write(standing_of(snapshot, self._worst), snapshot.step, time.time())
        if snapshot.news:
            self._writer.add_text(f"{self._root}incidents", text_of(snapshot.news), snapshot.step)

    def close(self, snapshot: Snapshot) -> None:
        """Write the last step and the verdict, and flush the writer."""
        if snapshot.step >= 0:
            self.step(snapshot)
            self._writer.add_text(f"{self._root}verdict", snapshot.verdict, snapshot.step)
        self._writer.flush()
        if self._own:
            self._writer.close()
