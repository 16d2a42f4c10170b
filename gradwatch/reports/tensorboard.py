"""Scalars and incidents for TensorBoard."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, ClassVar

from gradwatch.errors import UsageError
from gradwatch.reports.base import Report
from gradwatch.reports.scalars import scalars_of, text_of

if TYPE_CHECKING:
    from typing import Any

    from gradwatch.records import Snapshot


class TensorBoard(Report):
    """Writes the global norm, the clip coefficient and the layers closest to their limits, and incident changes as text.

    Numbers are written at most once a second.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` (or one of tensorboardX), which the user closes; None: a new one with
            default arguments, which writes below ``runs`` and is closed at the end.
        worst: number of layers to write.

    Raises:
        UsageError: there is no writer, and tensorboard is not installed.
    """

    period: ClassVar[float] = 1.0

    def __init__(self, writer: Any = None, worst: int = 5) -> None:
        self._own = writer is None
        if writer is None:
            try:
                writer = pkgutil.resolve_name("torch.utils.tensorboard:SummaryWriter")()
            except ImportError:
                raise UsageError("tensorboard is not installed: pip install 'gradwatch[tensorboard]'") from None
        self._writer = writer
        self._worst = worst

    def step(self, snapshot: Snapshot) -> None:
        """Write the numbers of the current step, and the incidents that changed as text."""
        for name, value in scalars_of(snapshot, self._worst).items():
            self._writer.add_scalar(name, value, snapshot.step)
        if snapshot.news:
            self._writer.add_text("gradwatch/incidents", text_of(snapshot.news), snapshot.step)

    def close(self, snapshot: Snapshot) -> None:
        """Write the last step and the verdict, and flush the writer."""
        if snapshot.step >= 0:
            self.step(snapshot)
            self._writer.add_text("gradwatch/verdict", snapshot.verdict, snapshot.step)
        self._writer.flush()
        if self._own:
            self._writer.close()
