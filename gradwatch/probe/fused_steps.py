"""Steps that optimizers make inside backward, one for each parameter: collected until that backward ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch import device

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.readback import Unread
    from gradwatch.probe.gradients import Gradients
    from gradwatch.records import Family, Floats


class FusedSteps:
    """The steps of the backward under way.

    Attributes: ``parts`` are those so far, each with its learning rates; ``family`` is the last optimizer's.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Measured | Unread, Floats]] = []
        self._seen: set[int] = set()
        self.family: Family = "other"

    def measure(self, mine: Gradients, home: torch.device) -> Measured | Unread:
        """Measure what one optimizer is about to step with."""
        return mine.measure() if device.reading_is_free(home) else mine.measure_unread(home)

    def has_seen(self, part: Measured | Unread) -> bool:
        """True if a parameter of ``part`` has had its step already: then another backward is under way."""
        return not self._seen.isdisjoint(part.columns.tolist())

    def add(self, part: Measured | Unread, mine: Gradients, optimizer: Optimizer) -> None:
        """Take one step."""
        self._seen.update(part.columns.tolist())
        self.parts.append((part, mine.rate(optimizer)))
        self.family = mine.family

    def end(self) -> list[tuple[Measured | Unread, Floats]]:
        """Return the steps of the backward that has ended, and begin anew."""
        parts, self.parts = self.parts, []
        self._seen.clear()
        return parts
