"""The numbers of a step, written into a row on the device without reading one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradwatch import device
from gradwatch.measure.norms import on_device
from gradwatch.measure.packed_row import (
    AFTER,
    BACKWARD_BAD,
    CLOSELY,
    DECIDED,
    EVERY,
    FAILED_RULES,
    FLAGS,
    GRADIENT_BAD,
    LEFT_OUT,
    LOSS,
    LOSS_BAD,
    LOSSES,
    NOW,
    PRESENT,
    SQUARE,
)
from gradwatch.measure.readback import Unread
from gradwatch.measure.sampling import Parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from gradwatch.distributed.group import Ranks
    from gradwatch.distributed.words import Word
    from gradwatch.measure.readback import Slot

_PATTERNS = 64  # patterns of layers with a gradient whose indices are kept on the device


class RowWriter:
    """Writes the rows of one monitor.

    Args:
        home: the device on which rows are made.
        ranks: the processes that train together; None: this one alone.

    Attributes:
        parts: what this process holds of each layer, on the device; None if it trains alone.
    """

    def __init__(self, home: torch.device, ranks: Ranks | None) -> None:
        self._home, self._ranks = home, ranks
        self.parts = Parts(on_device(ranks.share, home), on_device(ranks.part, home)) if ranks is not None else None
        self._kept: dict[Any, Tensor] = {}
        self._after: Tensor | None = None

    def write(
        self, slot: Slot, whole: Unread, now: Unread, loss: Tensor | float | None, own_norms: list[Tensor]
    ) -> None:
        """Write norms and loss into a row of zeros.

        Args:
            slot: the row.
            whole: norms that the row describes.
            now: norms as the optimizer sees them.
            loss: loss of the step; None: no loss was seen.
            own_norms: norms of this process's own backwards.
        """
        if len(whole.columns):
            index, squares = self.index(whole.columns), self.shared(whole)
            slot.rows[SQUARE].scatter_(0, index, squares)
            slot.rows[PRESENT].scatter_(0, index, 1.0)
            slot.singles[NOW].copy_((squares if now is whole else self.shared(now)).sum())
        if loss is not None:
            if isinstance(loss, torch.Tensor):
                slot.singles[LOSS].copy_(device.moved(loss, self._home))
            else:
                slot.singles[LOSS].fill_(loss)
            slot.singles[LOSSES].fill_(1.0)
        if self._ranks is not None:
            flags = GRADIENT_BAD * ~torch.isfinite(slot.rows[SQUARE].sum() + slot.singles[NOW])
            flags = flags + LOSS_BAD * ~torch.isfinite(slot.singles[LOSS])
            if own_norms:
                norms = torch.stack(
                    [device.moved(norm, self._home, device.widest_float(self._home)) for norm in own_norms]
                )
                flags = flags + BACKWARD_BAD * ~torch.isfinite(norms).all()
            slot.ranks[FLAGS, self._ranks.rank].copy_(flags)
            if self._after is not None:
                slot.singles[AFTER].copy_(self._after)
                self._after = None

    def write_word(self, slot: Slot, word: Word, rank: int) -> None:
        """Write what this process states about itself into the row."""
        slot.ranks[FLAGS, rank].add_(CLOSELY * word.closely)
        for index, number in ((EVERY, word.every), (FAILED_RULES, word.failed), (DECIDED, word.decided)):
            if number:
                slot.ranks[index, rank].fill_(number)
        if word.leaves_out:
            slot.singles[LEFT_OUT].fill_(1.0)

    def write_next(self, after: Tensor) -> None:
        """Have this process's part of the squared norm after a clip written into the next row."""
        self._after = after

    def same_columns(self, before: Unread, now: Unread) -> Unread:
        """Return ``before`` restricted to the columns of ``now``; ``now`` if some of these came after the clip."""
        if np.array_equal(before.columns, now.columns):
            return before
        if not np.isin(now.columns, before.columns).all():
            return now

        def indices() -> NDArray[Any]:
            where = {column: index for index, column in enumerate(before.columns.tolist())}
            return np.array([where[column] for column in now.columns.tolist()])

        return Unread(
            [], now.columns, before.norms[self._keep((before.columns.tobytes(), now.columns.tobytes()), indices)]
        )

    def index(self, columns: NDArray[Any]) -> Tensor:
        """Return columns as an index on the device."""
        return self._keep(columns.tobytes(), lambda: columns)

    def shared(self, measured: Unread) -> Tensor:
        """Return squares of norms, multiplied by the share of this process in each layer."""
        squares = torch.square(measured.norms)
        return squares if self.parts is None else squares * self.parts.share[self.index(measured.columns)]

    def _keep(self, key: Any, make: Callable[[], NDArray[Any]]) -> Tensor:
        """Return the result of ``make`` as a tensor on the device, computed once for each ``key``."""
        if key not in self._kept:
            if len(self._kept) >= _PATTERNS:
                self._kept.clear()
            self._kept[key] = on_device(make(), self._home)
        return self._kept[key]
