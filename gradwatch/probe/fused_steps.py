"""Steps that optimizers make inside a backward, one per parameter, collected until that backward ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.readback import Unread
    from gradwatch.probe.gradients import Gradients
    from gradwatch.records import Family, Floats


class FusedSteps:
    """The steps of the backward under way.

    Attributes:
        parts: measured gradients of each step so far, with its learning rates.
        family: family of the last optimizer.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Measured | Unread, Floats]] = []
        self._seen: set[int] = set()
        self.family: Family = "other"

    def has_seen(self, part: Measured | Unread) -> bool:
        """Return whether a parameter of ``part`` has had its step already, so that another backward is under way."""
        return not self._seen.isdisjoint(part.columns.tolist())

    def add(self, part: Measured | Unread, mine: Gradients, optimizer: Optimizer) -> None:
        """Add one step."""
        self._seen.update(part.columns.tolist())
        self.parts.append((part, mine.rate(optimizer)))
        self.family = mine.family

    def end(self) -> list[tuple[Measured | Unread, Floats]]:
        """Return the steps of the backward that has ended, and clear them."""
        parts, self.parts = self.parts, []
        self._seen.clear()
        return parts
