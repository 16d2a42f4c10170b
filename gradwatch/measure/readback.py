"""Asynchronous copies of rows from a device to the host.

A row is written into a ring on the device and copied to pinned memory. An event signals its arrival a few steps later. The
host waits for a row only if the ring is full, if several processes must read it at the same step, and at the end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.measure.packed_row import PackedRow, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor


RING = 64  # most rows under way; a host that is further ahead waits for the oldest
LAG = 8  # steps after which each of several processes reads a row, so that all reach the same decision
PATIENCE = 10  # steps in a row that a gradient scaler may leave out before one of them is judged


@dataclass(slots=True)
class Unread:
    """Gradients and their norms at one moment, on a device. ``norms`` and ``columns`` have shape (n,)."""

    gradients: list[Tensor]
    columns: NDArray[Any]
    norms: Tensor


def joined(parts: list[Unread]) -> Unread:
    """Return the norms of one backward, merged from parts whose gradients no longer exist."""
    return Unread([], np.concatenate([part.columns for part in parts]), torch.cat([part.norms for part in parts]))


class Slot:
    """One row on the device, with the views of a `gradwatch.measure.packed_row.PackedRow` as tensors."""

    def __init__(self, flat: Tensor, layers: int, processes: int) -> None:
        ends, last = size_of(layers, 0) - size_of(0, 0), size_of(layers, 0)
        self.flat = flat
        self.rows = flat[:ends].view(-1, layers)
        self.singles = flat[ends:last]
        self.ranks = flat[last:].view(-1, processes)


class ReadbackRing:
    """The rows under way from ``home`` to the host, oldest first.

    Args:
        layers: number ``L`` of layers.
        processes: number ``W`` of processes.
        home: device on which rows are computed.
        lag: number of steps after which a row is read, waiting for it if necessary; None: it is read once it has arrived.
    """

    def __init__(self, layers: int, processes: int, home: torch.device, lag: int | None = None) -> None:
        size = size_of(layers, processes)
        self._layers, self._processes, self._lag = layers, processes, lag
        self._device = torch.zeros(RING, size, dtype=device.widest_float(home), device=home)
        # explicitly on the CPU, whatever the default device is: only CPU memory can be pinned
        self._host = torch.zeros(
            RING, size, dtype=device.widest_float(home), device="cpu", pin_memory=home.type == "cuda"
        )
        self._slots = [Slot(row, layers, processes) for row in self._device]
        self._under_way: deque[tuple[int, int, Any, Any]] = deque()
        self._sent = 0
        self.home = home

    @property
    def under_way(self) -> int:
        """The number of rows under way."""
        return len(self._under_way)

    def next(self) -> Slot:
        """Return the slot for the coming row, filled with zeros."""
        slot = self._slots[self._sent % RING]
        slot.flat.zero_()
        return slot

    def send(self, facts: Any) -> None:
        """Start copying the row that was written into the slot from `next`; `arrived` yields ``facts`` along with it."""
        place = self._sent % RING
        event = None
        if self.home.type != "meta":  # meta tensors have no values to copy
            self._host[place].copy_(self._device[place], non_blocking=True)
            if self.home.type != "cpu":
                event = torch.Event(self.home)
                event.record(torch.accelerator.current_stream(self.home))
            self._under_way.append((self._sent, place, event, facts))
        self._sent += 1

    def arrived(self, *, wait: bool = False) -> Iterator[tuple[Any, PackedRow]]:
        """Yield the facts and numbers of the rows that can be read now; with ``wait``, of all rows under way.

        Waits for the device if ``wait`` is set, if the ring is full, or if a row is ``lag`` steps old. While a graph is
        captured no row can be read.
        """
        while self._under_way and not device.capturing():
            number, place, event, facts = self._under_way[0]
            age = self._sent - number
            must = wait or age >= (RING if self._lag is None else self._lag)
            if event is not None and must:
                event.synchronize()
            elif not must and (self._lag is not None or (event is not None and not device.is_over(event))):
                return
            self._under_way.popleft()
            yield facts, PackedRow(self._layers, self._processes, self._host[place].double().numpy().copy())
