"""Distributed trainings on gloo: the rows of the tests and of docs/training-modes.md, and the script of each process.

Run as ``python -m tests.torchrun PROCESSES tests.processes FOLDER``: all trainings of that number of processes are made, one
after the other, and each process leaves what it saw as JSON in FOLDER. They start from the same model in float64 and see the
same data as `alone`, so that their numbers must agree with it. With ``killed`` in the place of FOLDER it is a training whose
last process dies.
"""

from __future__ import annotations

import io
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import device
from gradwatch.distributed import group as ranks
from gradwatch.measure.wrappers import local_of
from tests.trainings import data, true_norm

STEPS = 6
mse = nn.functional.mse_loss


def plain() -> nn.Sequential:
    """Return the model that all trainings start from."""
    torch.manual_seed(0)
    parts = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 1)]
    return nn.Sequential(*parts).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the whole batch of a step: 32 rows, whatever the number of processes."""
    x, y = data()
    return x[32 * step : 32 * step + 32].double(), y[32 * step : 32 * step + 32].double()


def alone() -> dict[str, Any]:
    """Train in one process; return the true norms by a dumb loop, by step and layer, and the losses."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    norms, losses = [], []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        norms.append({name: true_norm(parameter.grad) for name, parameter in model.named_parameters()})
        losses.append(loss.item())
        optimizer.step()
    return {"norms": norms, "losses": losses}


@dataclass
class Training:
    """What a mode makes of the plain model, and which rows of the batch this process sees in each backward."""

    model: nn.Module
    watched: nn.Module
    parts: list[list[int]]
    no_sync: Callable[[], Any] | None = None
    attach_first: bool = False


Make = Callable[[nn.Module, int, int], Training]


@dataclass(frozen=True)
class Mode:
    """One row of the matrix."""

    name: str
    processes: int
    recorded: str
    make: Make = field(repr=False)
    names: bool = True


MODES: list[Mode] = []
WHOLE = "reduced gradients, averaged losses"
SHARDS = "norms of whole layers, from those of the shards; averaged losses"


def mode(name: str, processes: int, recorded: str, *, names: bool = True) -> Callable[[Make], Make]:
    """Add a training to the matrix."""

    def add(make: Make) -> Make:
        MODES.append(Mode(name, processes, recorded, make, names))
        return make

    return add


def rows(rank: int, size: int, pieces: int = 1) -> list[list[int]]:
    """Return this process's rows of the batch, in ``pieces`` backwards."""
    mine = list(range(rank, 32, size))
    return [mine[start::pieces] for start in range(pieces)]


@mode("DistributedDataParallel", 2, WHOLE)
def _ddp(model: nn.Module, rank: int, size: int) -> Training:
    wrapped = DistributedDataParallel(model)
    return Training(wrapped, wrapped, rows(rank, size))


@mode("DistributedDataParallel, 4 processes", 4, WHOLE)
def _ddp4(model: nn.Module, rank: int, size: int) -> Training:
    return _ddp(model, rank, size)


@mode("DistributedDataParallel, built around the model after attach", 2, WHOLE)
def _ddp_later(model: nn.Module, rank: int, size: int) -> Training:
    return Training(DistributedDataParallel(model), model, rows(rank, size), attach_first=True)


@mode("DistributedDataParallel, static graph, gradients as bucket views", 2, WHOLE)
def _ddp_static(model: nn.Module, rank: int, size: int) -> Training:
    wrapped = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
    return Training(wrapped, wrapped, rows(rank, size))


@mode("DistributedDataParallel, accumulation under `no_sync`", 2, WHOLE)
def _ddp_no_sync(model: nn.Module, rank: int, size: int) -> Training:
    wrapped = DistributedDataParallel(model)
    return Training(wrapped, wrapped, rows(rank, size, pieces=2), wrapped.no_sync)


def _sharded(model: nn.Module, mesh: Any) -> Any:
    for part in model.children():
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@mode("FSDP2 (`fully_shard`)", 2, SHARDS)
def _fsdp2(model: nn.Module, rank: int, size: int) -> Training:
    sharded = _sharded(model, init_device_mesh("cpu", (size,)))
    return Training(sharded, sharded, rows(rank, size))


@mode("FSDP2, sharded after attach", 2, SHARDS)
def _fsdp2_later(model: nn.Module, rank: int, size: int) -> Training:
    return Training(model, model, rows(rank, size), attach_first=True)


@mode("FSDP2, accumulation, reduced each time", 2, SHARDS)
def _fsdp2_accumulating(model: nn.Module, rank: int, size: int) -> Training:
    sharded = _sharded(model, init_device_mesh("cpu", (size,)))
    return Training(sharded, sharded, rows(rank, size, pieces=2))


@mode("FSDP2, accumulation without reducing", 2, SHARDS)
def _fsdp2_no_sync(model: Any, rank: int, size: int) -> Training:
    sharded: Any = _sharded(model, init_device_mesh("cpu", (size,)))

    class Held:
        def __enter__(self) -> None:
            sharded.set_requires_gradient_sync(False)

        def __exit__(self, *_: object) -> None:
            sharded.set_requires_gradient_sync(True)

    return Training(sharded, sharded, rows(rank, size, pieces=2), Held)


@mode("HSDP, 2 x 2: replicated and sharded", 4, SHARDS)
def _hsdp(model: nn.Module, rank: int, size: int) -> Training:
    sharded = _sharded(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return Training(sharded, sharded, rows(rank, size))


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


@mode("tensor parallel, plain parameters beside DTensors", 2, SHARDS)
def _tp(model: nn.Module, _rank: int, size: int) -> Training:
    parallel = parallelize_module(model, init_device_mesh("cpu", (size,)), PLAN)
    return Training(parallel, parallel, rows(0, 1))


@mode("FSDP2 x tensor parallel, 2 x 2", 4, SHARDS)
def _fsdp2_tp(model: nn.Module, rank: int, _size: int) -> Training:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallel = parallelize_module(model, mesh["tensor"], PLAN)
    sharded = _sharded(parallel, mesh["data"])
    return Training(sharded, sharded, rows(rank // 2, 2))


@mode("FSDP1, `use_orig_params=True`", 2, SHARDS)
def _fsdp1(model: nn.Module, rank: int, size: int) -> Training:
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return Training(sharded, sharded, rows(rank, size))


@mode("FSDP1, `use_orig_params=False`", 2, "one layer for each flat unit; the usual global norm", names=False)
def _fsdp1_flat(model: nn.Module, rank: int, size: int) -> Training:
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return Training(sharded, sharded, rows(rank, size))


class PoisonBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        """Pass through."""
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        """Lose everything."""
        return gradients[0] * math.nan


class Play(NamedTuple):
    """A training: in which mode, what goes wrong (in the last process, or in all), which clip, by the path for devices."""

    name: str
    event: str = "nothing"
    clip: str | None = None
    later: bool = False


DDP, FSDP2, BOTH = "DistributedDataParallel", "FSDP2 (`fully_shard`)", "FSDP2 x tensor parallel, 2 x 2"
PAIRS = [DDP, FSDP2, "tensor parallel, plain parameters beside DTensors"]
PLAYS = [
    *[Play(mode.name) for mode in MODES],
    *[Play(name, event, "norm") for name in PAIRS[:2] for event in ("nan loss", "nan gradient")],
    Play(DDP, "nan backward", "norm"),
    *[Play(name, "explodes", clip) for name in PAIRS for clip in ("norm", "value")],
    *[Play(name, later=True) for name in (DDP, FSDP2, BOTH)],
    *[Play(FSDP2, *what, later=True) for what in (("nan loss", "norm"), ("explodes", "norm"), ("explodes", "value"))],
    *[Play(DDP, "gradwatch fails", "norm", later=later) for later in (False, True)],
    Play(DDP, "one attaches", "norm"),
]
_FREE, _PATIENCE = device.reading_is_free, ranks._PATIENCE


def train(one: Play) -> dict[str, Any]:
    """Train in this process; return what its monitor saw."""
    name, event, clip, later = one
    device.reading_is_free = (lambda _: False) if later else _FREE  # type: ignore[assignment]
    ranks._PATIENCE = 2.0 if event == "one attaches" else _PATIENCE
    rank, size = dist.get_rank(), dist.get_world_size()
    exchanges = [0]
    _count(exchanges)
    found = next(m for m in MODES if m.name == name)
    model = plain()
    ready = None if found.name == "FSDP2, sharded after attach" else found.make(model, rank, size)
    policy = gradwatch.AutoClip(clip, hold=5) if clip else None
    monitor = None
    if event != "one attaches" or rank == 0:
        # a training that is watched by one process only shall go on
        monitor = gradwatch.attach(ready.watched if ready else model, clip=policy, report="log")
    if ready is None:
        _sharded(model, init_device_mesh("cpu", (size,)))
        ready = found.make(model, rank, size)
    optimizer = torch.optim.SGD(ready.model.parameters(), lr=0.05)
    for step in range(STEPS if event == "nothing" else 30):
        bad = step == 3 and rank == size - 1
        x, y = batch(step % STEPS)
        optimizer.zero_grad()
        for number, part in enumerate(ready.parts):
            waiting = ready.no_sync is not None and number < len(ready.parts) - 1
            with ready.no_sync() if waiting and ready.no_sync is not None else nullcontext():
                loss = _loss(ready.model, x[part], y[part], event, bad=bad) * len(part) / sum(map(len, ready.parts))
                if event == "explodes" and step >= 12:
                    loss = loss * 4.0 ** (step - 12)
                loss.backward()
        if bad and event == "nan gradient":
            gradient = next(p.grad for p in ready.model.parameters() if p.grad is not None)
            local_of(gradient).view(-1)[0] = math.nan
        if bad and event == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if bad and event == "gradwatch fails" and monitor is not None:
            sampling: Any = monitor._probe.recorder._sampling
            sampling.take = sampling.take_unread = None
        optimizer.step()
    if monitor is None:
        return {}
    seen = {"hooks": len(monitor._probe.gradient_hooks)}
    monitor.detach()
    return seen | _seen(monitor, ready.model, exchanges[0])


_exchange = ranks.Ranks.exchange


def _count(exchanges: list[int]) -> None:
    def counting(self: Any, flat: Tensor) -> None:
        exchanges[0] += 1
        _exchange(self, flat)

    ranks.Ranks.exchange = counting  # type: ignore[method-assign]


def _loss(model: nn.Module, x: Tensor, y: Tensor, event: str, *, bad: bool) -> Tensor:
    if bad and event == "nan loss":
        x = x * math.nan
    output = model(x)
    if bad and event == "nan backward":
        output = PoisonBackward.apply(output)  # type: ignore[no-untyped-call]
    return mse(output, y)


def _seen(monitor: gradwatch.Monitor, model: nn.Module, exchanges: int) -> dict[str, Any]:
    history = monitor.history
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "layers": list(history.layers),
        "norms": history.grad_norm().tolist(),
        "global": history.global_norm().tolist(),
        "losses": history.loss().tolist(),
        "weights": history.weight_norm(last=1).tolist(),
        "coefficients": history.clip_coefficient().tolist(),
        "skipped": history.skipped().tolist(),
        "incidents": [
            [i.kind, i.verdict, i.opened_step, i.suspect, list(i.ranks), list(i.evidence), str(i.clip)]
            for i in monitor.incidents
        ],
        "notes": monitor.notes,
        "processes": history.provenance.processes,
        "exchanges": exchanges,
        "parameters": [p.detach().flatten().tolist() for p in whole],
    }


def see() -> list[tuple[Play, dict[str, Any]]]:
    """Make all trainings of this number of processes; return what was seen of each."""
    if sys.argv[1] == "killed":
        train(Play("DistributedDataParallel, 4 processes", "killed", "norm"))
    processes = {mode.name: mode.processes for mode in MODES}
    seen = []
    for one in PLAYS:
        if processes[one.name] == dist.get_world_size():
            output = io.StringIO()
            with redirect_stdout(output), redirect_stderr(output):
                found = train(one)
            seen.append((one, {**found, "output": output.getvalue()}))
            dist.barrier()
    return seen
