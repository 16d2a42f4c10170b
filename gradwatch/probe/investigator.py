"""The interface by which the probe tells of steps that are not finite. The probe knows the forensics only through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.records import Row


class Investigator(Protocol):
    """Finds the operation that made the first non-finite number. Implemented by `gradwatch.forensics.Inspector`."""

    def start(self) -> None:
        """Install what has to be kept of each step."""

    def stop(self) -> None:
        """Remove and drop everything."""

    def backward_begins(self, roots: Any, losses: list[Any]) -> None:
        """Called before a backward, when its graph is still whole, with its roots and what is known of their values."""

    def gradients_arrived(self, row: Row) -> None:
        """Called with a row whose gradients or weights are not finite, before it is judged and before the update."""

    def step_over(self, optimizer: Optimizer | None) -> None:
        """Called after an optimizer has stepped, or when a step was left out."""

    def row_sent(self) -> None:
        """Called when a device begins to send the row of a step."""

    def row_arrived(self, row: Row) -> None:
        """Called with each row that a device has sent, before it is judged."""
