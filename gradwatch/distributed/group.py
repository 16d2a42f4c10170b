"""The processes that train one model together: who they are, what each holds, and the one exchange of a step.

Each process measures its own part. Squares are shared out (one over the number of processes that hold the same), so that
a single sum over all processes gives the norms of the whole in DDP, FSDP2, tensor parallelism and their mixtures. All
processes then hold the same row and come to the same decision.
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

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
from gradwatch.measure.wrappers import flat_modules, is_dtensor, replica_of, whole_shapes
from gradwatch.records import Culprits, CulpritSign

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradwatch.measure.layers import Layers
    from gradwatch.measure.measured_gradients import Measured
    from gradwatch.measure.sampling import Sample

_PATIENCE = 30.0  # seconds that the first step waits for the other processes to watch as well


class Unsupported(Exception):  # noqa: N818  it is a finding, told in a note
    """A kind of parallel training that cannot be measured as a whole; the message says why."""


@dataclass(slots=True)
class Local:
    """What this process alone knows of a step, beside norms.

    ``backward_bad``: its own backward gave gradients that are not finite. ``after``: its part of the squared norm that
    was left by a clip by value at the step before. ``word``: what it says of itself.
    """

    loss: float | None
    word: Word
    backward_bad: bool = False
    after: float = 0.0
    buffer_bad: bool = False


@dataclass(slots=True)
class Word:
    """What a process says of itself with each row, for nothing that it alone knows may decide what is exchanged or done.

    Args:
        every: the optimizer steps that it wants between rows; 0: it has no wish.
        closely: it would watch closely.
        failed: the rules that failed in it, a bit for each.
        decided: a number of what auto-clip has decided in it so far.
        leaves_out: its gradient scaler leaves this step out.
    """

    every: int = 0
    closely: bool = False
    failed: int = 0
    decided: int = 0
    leaves_out: bool = False


@dataclass(slots=True)
class Agreed:
    """What follows from the words of all processes, in each of them.

    ``every`` is the largest wish, ``closely`` is true where one of them is, ``failed`` holds the rules that failed in any;
    ``parted`` are the ranks whose auto-clip has decided otherwise than the first's, ``left_out``: all leave the step out.
    """

    every: int
    closely: bool
    failed: int
    parted: tuple[int, ...]
    left_out: bool


@dataclass(slots=True)
class United:
    """What all processes know of it: the mean loss, where trouble came from, the norm after the last clip by value."""

    loss: float | None
    culprits: Culprits | None
    after_norm: float
    buffer_bad: bool
    agreed: Agreed


class Ranks:
    """The group of processes, and each layer's part in this one.

    Attributes: ``share`` (L,) is one over the number of processes that hold the same part of a layer; ``part`` (L,) is
    the share of the whole layer's elements that this process answers for. ``sharded``: processes hold parts of layers.
    """

    def __init__(self, layers: Layers, group: Any, replica: Any = None, pieces: int = 1) -> None:
        self._layers = layers
        self._group = None if group is dist.group.WORLD else group  # destroyed at exit, it shall not be held here
        self._pieces = pieces
        self._replica = weakref.ref(replica) if replica is not None else None
        self.averages = replica is not None
        self.exchanged = False
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.world = [dist.get_global_rank(group, rank) for rank in range(self.size)] if group else range(self.size)
        self.home = _home(group)
        self.ours()

    def ours(self) -> None:
        """Look up which part of each layer this process holds."""
        self.share, self.part = np.zeros((2, len(self._layers)))
        self.sharded = False
        parameter: Any
        model = self._layers.model
        flat = whole_shapes(model) if model is not None else {}
        for column, parameter in self._layers.parameters():
            pieces = self._pieces if id(parameter) in flat else 1
            held = parameter
            if is_dtensor(parameter):
                split = [
                    (length, placement)
                    for length, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True)
                    if not placement.is_replicate()
                ]
                pieces = math.prod(length for length, _ in split)
                held = parameter.to_local()
                if any(getattr(placement, "dim", 0) for _, placement in split):
                    self._layers.split_units(column)
            self.sharded |= pieces > 1
            self.share[column] = pieces / self.size
            self.part[column] = self.share[column] * held.numel() / max(1, self._layers.sizes[column])

    @property
    def apart(self) -> bool:
        """True from the first `model.join()` on: some processes may have no more batches, so nothing may be exchanged.

        Torch does not tell when the context ends.
        """
        replica = self._replica() if self._replica is not None else None
        return replica is not None and bool(replica._join_config.enable)

    def agree(self, settings: dict[str, str]) -> list[dict[str, str]] | None:
        """Find out whether every process of the group watches this model, and how: exchanging alone would hang the training.

        Returns the ``settings`` of each where they differ, nothing where all are the same, None where some do not watch.
        Goes through the store that the processes met at, not through a collective. The first to decide decides for all.
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
        """Make the numbers of this process those of all; ``whole``, ``now`` and ``sampled`` are changed in place.

        Raises:
            ExchangeError: a process is gone.
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
            rows[WEIGHT] = np.where(self.part > 0, sampled.weight_norm**2 * self.share, 0.0)
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
            raise PeerError("gradwatch failed in another process, whose output has the cause")
        whole.norms, whole.global_norm = numbers.grad_norm, numbers.global_norm
        whole.nonfinite, whole.counts = numbers.nonfinite, numbers.counts
        now.global_norm = numbers.now_norm
        sampled.fill(numbers)
        bad = bool((numbers.ranks[FLAGS] & BUFFER_BAD).any())
        return United(numbers.loss, self.culprits(numbers), numbers.after_norm, bad, self.agreed(numbers))

    def agreed(self, numbers: UnpackedRow) -> Agreed:
        """Return what follows from the words of all processes."""
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
        """Ask whether what was just done went well in every process: one number more, for what may fail in one alone."""
        failures = torch.tensor([float(not well)], dtype=torch.float64, device=self.home)
        self.exchange(failures)
        return not failures.item()

    def part_of_square(self, measured: Measured) -> float:
        """Return this process's part of the squared global norm."""
        there = measured.columns
        return float(np.dot(measured.norms[there] ** 2, self.share[there]))

    def tell_failure(self) -> None:
        """Take part in one exchange only to say that gradwatch failed here, so that nobody waits for its rows."""
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
        """Sum a table over all processes, in place: the one collective of a step."""
        self.exchanged = True
        try:
            dist.all_reduce(flat, group=self._group)
        except Exception as error:
            raise ExchangeError(
                f"gradwatch could not exchange a row with the other {self.size - 1} processes: {error} "
                "One of them has probably ended; look at its output."
            ) from error

    def culprits(self, numbers: UnpackedRow) -> Culprits | None:
        """Return the processes that a non-finite step came from, None where there is none or that cannot be told."""
        for bit, sign in _SIGNS:
            found = np.flatnonzero(numbers.ranks[FLAGS] & bit)
            if 0 < found.size < self.size:
                return Culprits(tuple(int(self.world[rank]) for rank in found), sign)
        return None


_SIGNS: tuple[tuple[int, CulpritSign], ...] = (
    (LOSS_BAD, "loss"),
    (BACKWARD_BAD, "backward"),
    (GRADIENT_BAD, "gradient"),
)
_turns: dict[int, int] = {}


def is_first() -> bool:
    """True in the process that may draw: rank 0, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def find_ranks(model: nn.Module, layers: Layers) -> Ranks | None:
    """Return the processes that train ``model``; None when it is this one alone.

    Raises:
        Unsupported: several processes run, and how they share the work is not known.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.get_world_size()
    replica = replica_of(model)
    parameters: list[Any] = [parameter for _, parameter in layers.parameters()]
    meshes = {parameter.device_mesh for parameter in parameters if is_dtensor(parameter)}
    if meshes:
        widest = max(meshes, key=lambda mesh: mesh.size())
        copies = dist.get_world_size(replica.process_group) if replica is not None else 1
        if widest.size() * copies == world:
            return Ranks(layers, None, replica)
        if widest.ndim == 1 and replica is None and len(meshes) == 1:
            return Ranks(layers, widest.get_group())
        raise Unsupported(f"a device mesh {tuple(widest.shape)} among {world} processes has no group of its own")
    flat = flat_modules(model)
    if flat:
        between = getattr(flat[0], "_inter_node_pg", None)  # hybrid: sharded inside a node, replicated between nodes
        whole_world = between is not None and dist.get_world_size(flat[0].process_group) * between.size() == world
        split = 1 if flat[0].sharding_strategy.name == "NO_SHARD" else dist.get_world_size(flat[0].process_group)
        return Ranks(layers, None if whole_world else flat[0].process_group, pieces=split)
    if replica is not None:
        return Ranks(layers, replica.process_group, replica)
    raise Unsupported(f"{world} processes run, and this model is none of DistributedDataParallel, FSDP and DTensors")


def _home(group: Any) -> torch.device:
    """Return the device that the group's collectives run on, the CPU where that is possible."""
    every: Any = dist.group.WORLD
    devices = (group or every)._device_types
    cpu = torch.device("cpu")
    return cpu if cpu in devices else torch.accelerator.current_accelerator() or cpu
