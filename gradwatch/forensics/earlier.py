"""The inputs of the steps whose rows a device has not sent yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.forensics.call import Call


class EarlierSteps:
    """Keeps the forwards of each step until its row has arrived."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, list[Call]]] = []
        self._sent = self._arrived = 0

    @property
    def lag(self) -> int:
        """The number of rows that are under way."""
        return self._sent - self._arrived

    def row_sent(self, calls: list[Call]) -> None:
        """Keep the forwards of the step whose row is about to be sent, without what would keep their graphs alive."""
        self._sent += 1
        if calls:
            self._kept.append((self._sent, [call.without_output() for call in calls]))

    def row_arrived(self) -> list[Call]:
        """Return the forwards of the step whose row has arrived, and drop them."""
        self._arrived += 1
        calls = next((kept for number, kept in self._kept if number == self._arrived), [])
        self._kept = [(number, kept) for number, kept in self._kept if number > self._arrived]
        return calls

    def forget(self) -> None:
        """Drop everything."""
        self._kept.clear()
