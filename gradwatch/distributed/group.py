"""The group of processes that train one model, the part of each layer that a process holds, and the exchange of a step.

Each process measures its own part. Squares are multiplied by a share (one over the number of processes that hold the same
part), so that a single sum over all processes gives the norms of the whole in DDP, FSDP2, tensor parallelism and their
combinations. All processes then have the same row and reach the same decision.
"""

from __future__ import annotations

import atexit
import json
import math
import time
import weakref
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from gradwatch.distributed.words import Agreed, Local, United
from gradwatch.errors import ExchangeError, PeerError
from gradwatch.measure.packed_row import (
    AFTER,
    BACKWARD_BAD,
    BUFFER_BAD,
    CHANGED,
    CLOSELY,
    DEAD,
    FAILED,
    FLAGS,
    GRADIENT_BAD,
    INFS,
    LEAVES_OUT,
    LOSS,
    LOSS_BAD,
    LOSSES,
    NANS,
    NOW,
    PRESENT,
    SQUARE,
    WEIGHT,
    PackedRow,
    UnpackedRow,
)
from gradwatch.measure.wrappers import is_dtensor, is_fully_sharded, whole_shapes
from gradwatch.records import Culprits, CulpritSign

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.sampling import Sample

_PATIENCE = 30.0  # seconds that the first step waits for the other processes to attach
_AT_EXIT = 0.02  # seconds for which the interpreter's lock is given up before it ends


def let_exchanges_end() -> None:
    """Give up the interpreter's lock for a moment, so that threads of gloo can drop the tensors of the last exchange.

    To drop one takes the lock, and a thread that still waits for it when the interpreter ends aborts the process.
    """
    time.sleep(_AT_EXIT)


class Ranks:
    """The group of processes that train a model together, and the part of each layer that this process holds.

    Attributes:
        share: one over the number of processes that hold the same part of a layer's gradient, shape (L,).
        weight_share: the same of a layer's weights, of which ZeRO may divide more than of gradients, shape (L,).
        part: share of the elements of the whole layer that this process accounts for, shape (L,).
        sharded: whether processes hold parts of layers.
        averages: whether DistributedDataParallel averages the gradients.
        exchanged: whether there has been an exchange.
        size, rank: number of processes in the group, and the rank of this process in it.
        world: global ranks of the processes in the group.
        home: device on which numbers are exchanged.
    """

    def __init__(self, layers: Layers, group: Any, replica: Any = None, pieces: int = 1) -> None:
        atexit.unregister(let_exchanges_end)  # once for all monitors
        atexit.register(let_exchanges_end)
        self._layers = layers
        self._group = None if group is dist.group.WORLD else group  # no reference: it is destroyed at exit
        self._pieces = pieces
        self._replica = weakref.ref(replica) if replica is not None else None
        self.averages = replica is not None
        self.exchanged = False
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.world = [dist.get_global_rank(group, rank) for rank in range(self.size)] if group else range(self.size)
        self.home = _home(group)
        # parts of FSDP and ZeRO are of gradients that all processes have made: who holds a NaN has not made it
        self._own_gradients = layers.model is None or not is_fully_sharded(layers.model)
        self._own_gradients &= layers.zero is None or not layers.zero.spread
        self._find_parts()

    def _find_parts(self) -> None:
        """Determine which part of each layer this process holds, and set `share`, `weight_share`, `part` and `sharded`."""
        self.share, self.weight_share, self.part = np.zeros((3, len(self._layers)))
        self.sharded = False
        parameter: Any
        model, zero = self._layers.model, self._layers.zero
        flat = whole_shapes(model) if model is not None else {}
        for column, parameter in self._layers.parameters():
            pieces = of_weights = self._pieces if id(parameter) in flat else 1
            held = parameter
            if zero is not None:
                pieces, of_weights = zero.parts(parameter, self.size)
                held = zero.weight(parameter)
                if pieces > 1:
                    self._layers.split_units(column)
            elif is_dtensor(parameter):
                split = [
                    (length, placement)
                    for length, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True)
                    if not placement.is_replicate()
                ]
                pieces = of_weights = math.prod(length for length, _ in split)
                held = parameter.to_local()
                if any(getattr(placement, "dim", 0) for _, placement in split):
                    self._layers.split_units(column)
            self.sharded |= pieces > 1
            self.share[column], self.weight_share[column] = pieces / self.size, of_weights / self.size
            self.part[column] = self.weight_share[column] * held.numel() / max(1, self._layers.sizes[column])

    @property
    def apart(self) -> bool:
        """True once `model.join()` has been entered. Some processes may have no more batches, so nothing may be exchanged.

        It stays True, because torch does not signal the end of the context.
        """
        replica = self._replica() if self._replica is not None else None
        return replica is not None and bool(replica._join_config.enable)

    def agree(self, settings: dict[str, str]) -> list[dict[str, str]] | None:
        """Find out whether every process of the group watches this model with the same settings.

        An exchange in which only some processes take part would hang the training. The processes communicate through the store
        of the default group, not through a collective, and wait at most 30 seconds for each other.

        Returns:
            An empty list if all settings are the same, the ``settings`` of each process if they differ, None if some
            processes do not watch. All processes get the same answer.
        """
        store = dist.distributed_c10d._get_default_store()
        names = zlib.crc32("\n".join([*self._layers.names, *map(str, self.world)]).encode())
        turn = _turns[names] = _turns.get(names, -1) + 1
        key = f"gradwatch/settings/{names}/{turn}"
        mine = json.dumps(settings, sort_keys=True)
        first = store.compare_set(f"{key}/first", "", mine).decode()
        if mine != first:
            store.set(f"{key}/of {self.rank}", mine)
            store.add(f"{key}/others", 1)
        if store.add(f"{key}/watching", 1) == self.size:
            store.compare_set(f"{key}/verdict", "", "all")
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and not store.check([f"{key}/verdict"]):
            time.sleep(0.01)
        if store.compare_set(f"{key}/verdict", "", "some") != b"all":
            return None
        if not store.add(f"{key}/others", 0):
            return []
        own = [f"{key}/of {rank}" for rank in range(self.size)]
        return [json.loads(store.get(one).decode() if store.check([one]) else first) for one in own]

    def expect_exchange(self) -> None:
        """Take note that the other processes are about to wait for an exchange: ``exchanged`` is False until it is made."""
        self.exchanged = False

    def unite(self, mine: Local, whole: Measured, now: Measured, sampled: Sample) -> United:
        """Exchange the numbers of a step, and replace those of this process by those of all processes.

        Args:
            mine: what this process alone knows of the step.
            whole: gradients that the row describes; modified in place.
            now: gradients at this moment; its global norm is modified in place.
            sampled: sampled statistics; modified in place.

        Raises:
            ExchangeError: the exchange failed, probably because a process has ended.
            PeerError: gradwatch failed in another process.
        """
        table = PackedRow(len(self._layers), self.size)
        rows, singles = table.rows, table.singles
        there = whole.columns
        rows[SQUARE, there] = whole.norms[there] ** 2 * self.share[there]
        rows[PRESENT, there] = 1
        for column, (nans, infs) in (whole.counts or {}).items():
            rows[[NANS, INFS], column] = np.array([nans, infs]) * self.share[column]
        if sampled.weight_norm is not None:
            rows[WEIGHT] = np.where(self.part > 0, sampled.weight_norm**2 * self.weight_share, 0.0)
        if sampled.dead_share is not None and sampled.unchanged is not None:
            rows[DEAD] = np.where(self.part > 0, sampled.dead_share * self.part, 0.0)
            rows[CHANGED] = (sampled.unchanged == 0) & (self.part > 0)
        singles[NOW] = self.part_of_square(now)
        singles[AFTER] = mine.after
        if mine.loss is not None:
            singles[LOSS], singles[LOSSES] = mine.loss, 1
        word = mine.word
        table.ranks[:, self.rank] = (
            LOSS_BAD * (mine.loss is not None and not math.isfinite(mine.loss))
            + BACKWARD_BAD * mine.backward_bad
            + BUFFER_BAD * mine.buffer_bad
            + GRADIENT_BAD * (now.nonfinite is not None or whole.nonfinite is not None)
            + CLOSELY * word.closely
            + LEAVES_OUT * word.leaves_out,
            word.every,
            word.failed,
            word.decided,
        )
        self._exchange(table)
        numbers = UnpackedRow.of(table)
        if numbers.failed:
            raise PeerError("gradwatch failed in another process, whose output shows the cause")
        whole.norms, whole.global_norm = numbers.grad_norm, numbers.global_norm
        whole.nonfinite, whole.counts = numbers.nonfinite, numbers.counts
        now.global_norm = numbers.now_norm
        sampled.fill(numbers)
        bad = bool((numbers.ranks[FLAGS] & BUFFER_BAD).any())
        return United(numbers.loss, self.culprits(numbers), numbers.after_norm, bad, self.agreed(numbers))

    def agreed(self, numbers: UnpackedRow) -> Agreed:
        """Return the conclusions from the words of all processes."""
        flags, every, failed, decided = numbers.ranks
        others = np.flatnonzero(decided != decided[0]).tolist()
        return Agreed(
            int(every.max()),
            bool((flags & CLOSELY).any()),
            int(np.bitwise_or.reduce(failed)),
            tuple(int(self.world[rank]) for rank in others),
            bool((flags & LEAVES_OUT).all()),
        )

    def all_well(self, *, well: bool) -> bool:
        """Exchange one number and return True if an operation that may fail in a single process succeeded in all of them.

        ``well`` says whether it succeeded in this process.
        """
        failures = torch.tensor([float(not well)], dtype=torch.float64, device=self.home)
        self.exchange(failures)
        return not failures.item()

    def gather(self, value: Any) -> list[tuple[int, Any]]:
        """Exchange one object and return those of all processes, each with its rank in the world.

        Raises:
            ExchangeError: the collective failed, probably because a process has ended.
        """
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._group)
        except Exception as error:
            raise ExchangeError(
                f"gradwatch could not exchange a finding with the other {self.size - 1} processes: {error} "
                "One of them has probably ended; look at its output."
            ) from error
        return [(int(rank), one) for rank, one in zip(self.world, found, strict=True)]

    def part_of_square(self, measured: Measured) -> float:
        """Return the part of this process in the squared global norm."""
        there = measured.columns
        return float(np.dot(measured.norms[there] ** 2, self.share[there]))

    def tell_failure(self) -> None:
        """Announce in one exchange that gradwatch failed in this process, so that the others do not wait for its rows."""
        table = PackedRow(len(self._layers), self.size)
        table.singles[FAILED] = 1
        self._exchange(table)

    def _exchange(self, table: PackedRow) -> None:
        flat = torch.from_numpy(table.flat)
        there = flat.to(self.home)
        self.exchange(there)
        if there is not flat:
            flat.copy_(there)

    def exchange(self, flat: Tensor) -> None:
        """Sum a tensor over all processes in place.

        Raises:
            ExchangeError: the collective failed, probably because a process has ended.
        """
        self.exchanged = True
        try:
            dist.all_reduce(flat, group=self._group)
        except Exception as error:
            raise ExchangeError(
                f"gradwatch could not exchange a row with the other {self.size - 1} processes: {error} "
                "One of them has probably ended; look at its output."
            ) from error

    def culprits(self, numbers: UnpackedRow) -> Culprits | None:
        """Return the processes that non-finite values came from; None if no kind of them is confined to some."""
        for bit, sign in _SIGNS:
            found = np.flatnonzero(numbers.ranks[FLAGS] & bit)
            if 0 < found.size < self.size and (sign != "gradient" or self._own_gradients):
                return Culprits(tuple(int(self.world[rank]) for rank in found), sign)
        return None


_SIGNS: tuple[tuple[int, CulpritSign], ...] = (
    (LOSS_BAD, "loss"),
    (BACKWARD_BAD, "backward"),
    (GRADIENT_BAD, "gradient"),
)
_turns: dict[int, int] = {}


def _home(group: Any) -> torch.device:
    """Return the device on which the collectives of the group run, preferably the CPU."""
    every: Any = dist.group.WORLD
    devices = (group or every)._device_types
    cpu = torch.device("cpu")
    return cpu if cpu in devices else torch.accelerator.current_accelerator() or cpu
