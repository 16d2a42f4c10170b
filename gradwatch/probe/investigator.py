"""The interface by which the probe tells of steps that are not finite. The probe knows the forensics only through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradwatch.records import Row


class Together(Protocol):
    """The processes of a training, all of which look. Implemented by `gradwatch.distributed.group.Ranks`."""

    def gather(self, value: Any) -> list[tuple[int, Any]]:
        """Exchange one object; each process must call it."""


class Investigator(Protocol):
    """Finds the operation that made the first non-finite number. Implemented by `gradwatch.forensics.Inspector`.

    Attributes:
        watching: whether operations are watched, so that the end of a backward must be told.
    """

    watching: bool

    def start(self) -> None:
        """Install what has to be kept of each step."""

    def stop(self) -> None:
        """Remove and drop everything."""

    def backward_begins(self, roots: Any, losses: list[Any]) -> None:
        """Called before a backward, when its graph is still whole, with its roots and what is known of their values."""

    def gradients_arrived(self, row: Row, together: Together | None = None) -> None:
        """Called with a row whose gradients or weights are not finite, before it is judged and before the update.

        With several processes it is called in each of them, since they have the same row.
        """

    def backward_ended(self) -> None:
        """Called after a backward whose operations were watched."""

    def step_over(self, optimizer: Optimizer | None) -> None:
        """Called after an optimizer has stepped, or when a step was left out."""

    def row_sent(self) -> None:
        """Called when a device begins to send the row of a step."""

    def row_arrived(self, row: Row) -> None:
        """Called with each row that a device has sent, before it is judged."""
