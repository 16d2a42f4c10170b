"""Statistics that are sampled, not measured at each step: weight norms, dead units, weights that never change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradwatch.device import moved
from gradwatch.history.columns import widened
from gradwatch.history.schedule import cadence
from gradwatch.measure.measured_gradients import Measured
from gradwatch.measure.norms import NormPlan, count_nonfinite, fingerprint, has_units, live_units, on_device
from gradwatch.measure.packed_row import CHANGED, DEAD, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from gradwatch.measure.layers import Layers
    from gradwatch.measure.packed_row import UnpackedRow
    from gradwatch.measure.readback import Slot, Unread
    from gradwatch.records import Floats

_FIRST_ROWS = 32  # first rows, with each of which the weights are sampled
_WATCHED_ROWS = 45  # first rows, which include all of the first unit checks
_UNIT_CHECK_EVERY = 61  # odd, so that branches used on alternating steps are both checked
_FIRST_UNIT_CHECKS = frozenset((5, 10, 17, 24, 33, 44))  # even and odd, for the same reason
_ROUND = 4  # unit checks with a gradient of the layer after which a unit without any counts as dead


@dataclass(slots=True)
class Parts:
    """Copies of `Ranks.share` and `Ranks.part` on the device."""

    share: Tensor
    part: Tensor


@dataclass(slots=True)
class Sample:
    """The statistics that were sampled with one row; None for those that were not due. Arrays have shape (L,).

    Args:
        row: number of the row since attach.
        gone: layers whose parameter no longer exists or cannot be measured.
        weight_norm: weight norms.
        nonfinite_weight: whether the weights are not finite.
        dead_share: share of dead units.
        unchanged: number of rows for which the weights have not changed.
        first: number of the row since which changes are looked for.
    """

    row: int
    gone: NDArray[np.bool_]
    weight_norm: Floats | None = None
    nonfinite_weight: NDArray[np.bool_] | None = None
    dead_share: Floats | None = None
    unchanged: Floats | None = None
    first: Floats | None = None

    def fill(self, numbers: UnpackedRow) -> None:
        """Replace what was sampled by the numbers of all processes, or by those that arrived from a device."""
        if self.weight_norm is not None:
            known = ~self.gone
            self.weight_norm = np.where(known, numbers.weight_norm, np.nan)
            self.nonfinite_weight = known & ~np.isfinite(numbers.weight_norm)
        if self.unchanged is not None and self.first is not None:
            self.dead_share = numbers.dead_share
            self.unchanged = np.where(numbers.changed | self.gone, 0.0, self.row - self.first)


_NOT_DUE = Sample(-1, np.zeros(0, dtype=bool))


class Sampling:
    """The sampled statistics of one model. ``rows`` is the number of rows since attach."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._plan: NormPlan | None = None
        self._planned: tuple[list[torch.device], torch.device | None] = [], None
        self.rows = 0
        self._prints: dict[int, int] = {}
        self._changed: set[int] = set()  # columns whose weights have changed since, which are not looked at again
        self._first = np.zeros(len(layers))  # number of the row whose weights have the fingerprint
        self._alive: dict[int, tuple[Tensor, Tensor]] = {}  # looks of the round, live units, by column
        self._alive_at: torch.device | None = None
        self._dead_on: dict[int, Tensor] = {}
        self._prints_on: dict[int, Tensor] = {}
        self._columns = torch.zeros(0, device="cpu")
        self._dead_share = np.full(len(layers), np.nan)
        self._unchanged = np.zeros(len(layers))

    def grow(self, news: set[int]) -> None:
        """Extend the state to layers that were added and reset it for those whose parameter was replaced (``news``)."""
        self._alive.clear()
        for known in (self._prints, self._prints_on, self._dead_on):
            for column in news & known.keys():
                del known[column]
        self._changed -= news
        self._first = widened(self._first, len(self._layers), 0.0)
        self._dead_share = widened(self._dead_share, len(self._layers), np.nan)
        self._unchanged = widened(self._unchanged, len(self._layers), 0.0)
        self._plan = None

    def take(self, now: Measured, rate: Floats | None = None, *, closely: bool) -> Sample:
        """Return the sample that is due with the row ``now``. Call it without autograd.

        Args:
            now: what was measured.
            rate: learning rate of each layer, shape (L,); None: not known.
            closely: whether the weights are due in any case.
        """
        row, weights, unit_check = self._due(closely=closely)
        if not (weights or unit_check):
            return _NOT_DUE
        sample = Sample(row, self._gone())
        if weights:
            self._able(self._weights, sample)
        if unit_check:
            self._count_units(now)
            self._compare(row, _waiting(rate))
            sample.dead_share, sample.unchanged = self._dead_share.copy(), self._unchanged.copy()
            sample.first = self._first.copy()
        return sample

    def weights(self) -> Sample:
        """Return a sample of the weights although they are not due, for the last row."""
        sample = Sample(self.rows - 1, self._gone())
        self._able(self._weights, sample)
        return sample

    def _able(self, look: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``look``; if it raises because weights can no longer be measured, call it again without them."""
        try:
            return look(*arguments)
        except Exception:
            if not self._layers.leave_out():
                raise
            self._plan = None
            return look(*arguments)

    def _gone(self) -> NDArray[np.bool_]:
        gone = np.ones(len(self._layers), dtype=bool)
        gone[[column for column, _ in self._layers.measured()]] = False
        return gone

    def _due(self, *, closely: bool) -> tuple[int, bool, bool]:
        """Return the number of the row, whether the weights are due, and whether the check of units and changes is."""
        row, self.rows = self.rows, self.rows + 1
        weights = closely or row < _FIRST_ROWS or (row + 1) % cadence(row + 1) == 0  # as the rules judge
        return row, weights, _checks_units(row)

    @property
    def looks(self) -> bool:
        """True if the check of units and changes is due with the coming row."""
        return _checks_units(self.rows)

    @property
    def rest(self) -> int:
        """The number of coming rows for which nothing is due."""
        row = self.rows
        return 0 if row < _WATCHED_ROWS else min(-(row + 1) % cadence(row + 1), -row % _UNIT_CHECK_EVERY)

    def count(self) -> None:
        """Count a row for which nothing was due."""
        self.rows += 1

    def take_unread(
        self, now: Unread, slot: Slot, share: Parts | None, rate: Floats | None = None, *, closely: bool
    ) -> Sample:
        """Write the statistics that are due into ``slot`` on the device, and return a sample that says which they are.

        `Sample.fill` adds the numbers once they have arrived on the host.
        """
        row, weights, unit_check = self._due(closely=closely)
        sample = Sample(row, self._gone())
        home = slot.flat.device
        if weights:
            columns, norms = self._able(self._weights_on, home)
            squares = torch.square(norms)
            slot.rows[WEIGHT].scatter_(0, columns, squares if share is None else squares * share.share[columns])
            sample.weight_norm = np.zeros(len(self._layers))
        if unit_check:
            self._count_units_on(now, slot.rows[DEAD], share)
            self._compare_on(slot.rows[CHANGED], row, _waiting(rate))
            sample.dead_share = sample.unchanged = np.full(len(self._layers), np.nan)
            sample.first = self._first.copy()
        return sample

    def _weights_on(self, home: torch.device) -> tuple[Tensor, Tensor]:
        columns, parameters, plan = self._planned_for(home)
        if plan is not self._plan:
            self._plan, self._columns = plan, on_device(np.array(columns), home)
        return self._columns, plan.norms_on(home, parameters)

    def _planned_for(self, home: torch.device | None) -> tuple[list[int], list[Tensor], NormPlan]:
        """Return the columns and the weights that can be measured, and a plan for them, which is renewed if it is stale."""
        measured = list(self._layers.measured())
        parameters = [self._layers.held(parameter) for _, parameter in measured]
        plan, lie = self._plan, [parameter.device for parameter in parameters]
        if plan is None or self._planned != (lie, home):
            plan, self._planned = NormPlan(parameters), (lie, home)
        return [column for column, _ in measured], parameters, plan

    def _count_units_on(self, now: Unread, dead: Tensor, share: Parts | None) -> None:
        frozen = self._forget_frozen()
        for column in frozen & self._dead_on.keys():
            del self._dead_on[column]
        for column, over, found in self._looked_at_units(now, frozen):
            known = moved(self._dead_on[column], dead.device) if column in self._dead_on else math.nan
            self._dead_on.update({column: torch.where(moved(over, dead.device), moved(found, dead.device), known)})
        for column, here in self._dead_on.items():
            dead[column].copy_(here if share is None else here * share.part[column])
        unknown = [column for column in range(len(dead)) if column not in self._dead_on]
        if unknown:
            dead.scatter_(0, on_device(np.array(unknown), dead.device), np.nan)

    def _compare_on(self, changed: Tensor, row: int, waiting: set[int]) -> None:
        for column, parameter in self._layers.measured():
            if not parameter.requires_grad or column in waiting:
                self._prints_on.pop(column, None)
                changed[column].fill_(1)
                continue
            now = fingerprint(self._layers.held(parameter))
            if column not in self._prints_on:
                self._prints_on[column], self._first[column] = now, row
            changed[column].copy_(moved(now != moved(self._prints_on[column], now.device), changed.device))

    def _weights(self, sample: Sample) -> None:
        columns, parameters, self._plan = self._planned_for(None)
        norms = np.full(len(self._layers), np.nan)
        norms[columns] = self._plan.norms(parameters)
        nonfinite = np.zeros(len(self._layers), dtype=bool)
        for index in np.flatnonzero(~np.isfinite(norms[columns])).tolist():
            nans, infs, norms[columns[index]] = count_nonfinite(parameters[index])
            nonfinite[columns[index]] = nans + infs > 0
        sample.weight_norm, sample.nonfinite_weight = norms, nonfinite

    def _count_units(self, now: Measured) -> None:
        frozen = self._forget_frozen()
        self._dead_share[list(frozen)] = np.nan
        for column, over, share in self._looked_at_units(now, frozen):
            if over:
                self._dead_share[column] = share.item()

    def _forget_frozen(self) -> set[int]:
        """Forget the units seen of layers that are frozen, whose gradients may be left at zero; return their columns."""
        frozen = {column for column, parameter in self._layers.parameters() if not parameter.requires_grad}
        for column in frozen & self._alive.keys():
            del self._alive[column]
        return frozen

    def _looked_at_units(self, now: Measured | Unread, frozen: set[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Record which units have a gradient; yield the column of each layer, and whether its round is over and its dead share.

        Both have shape (). A look at which the layer has no gradient at all says nothing of its units, and does not count.
        """
        if not now.gradients:  # their tensors no longer exist
            return
        home = None if isinstance(now, Measured) else now.norms.device
        if home != self._alive_at:
            self._alive.clear()
            self._alive_at = home
        for gradient, column in zip(now.gradients, now.columns.tolist(), strict=True):
            if column in frozen or not self._layers.with_units[column] or not has_units(gradient):
                continue
            live = live_units(gradient)
            looks = live.any().long()
            if column in self._alive:
                before, known = self._alive[column]
                looks, live = looks + moved(before, live.device), live | moved(known, live.device)
            over = looks == _ROUND
            yield column, over, 1.0 - live.float().mean()
            self._alive[column] = looks * ~over, live & ~over

    def _compare(self, row: int, waiting: set[int]) -> None:
        """Compare the exact fingerprints of the weights with those of the first row in which they were to be trained."""
        for column, parameter in self._layers.measured():
            if column in self._changed:
                continue
            if not parameter.requires_grad or column in waiting:
                self._prints.pop(column, None)
                self._unchanged[column] = 0
                continue
            now = int(fingerprint(self._layers.held(parameter)).item())
            if column not in self._prints:
                self._prints[column], self._first[column] = now, row
            if self._prints[column] == now:
                self._unchanged[column] = row - self._first[column]
            else:
                self._changed.add(column)
                self._unchanged[column] = 0


def _checks_units(row: int) -> bool:
    return row == 0 or row in _FIRST_UNIT_CHECKS or row % _UNIT_CHECK_EVERY == 0


def _waiting(rate: Floats | None) -> set[int]:
    """Return the columns whose learning rate is zero beside others that are not: they wait to be unfrozen."""
    return set(np.flatnonzero(rate == 0).tolist()) if rate is not None and (rate > 0).any() else set()
