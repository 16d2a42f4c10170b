"""Trainings of two processes of which one makes a non-finite number: what each of them says.

Run as ``python -m tests.torchrun 2 tests.forensic_processes FOLDER``.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from benchmarks.forensics.causes import CAUSES, ROWS, WIDTH, Net
from gradwatch.measure.wrappers import local_of
from gradwatch.reports.log import LogReport

if TYPE_CHECKING:
    from collections.abc import Callable

LOG, SQRT = CAUSES["log of zero"], CAUSES["sqrt at zero"]
NEVER = gradwatch.AutoClip(gradwatch.ClipNorm(1e9))  # leaves out steps that are not finite, and clips no other
BAD = (2, 4)  # steps at which rank 1 fails


def sharded(model: nn.Module) -> nn.Module:
    """Return a model whose blocks are spread over the processes."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)  # type: ignore[return-value]


def train(
    wrap: Callable[[nn.Module], nn.Module],
    *,
    in_model: Callable[[Tensor], Tensor] = torch.tanh,
    in_loss: Callable[[Tensor], Tensor] = lambda out: out,
    watch: bool = True,
    forwards: int = 1,
    bad: tuple[int, ...] = BAD,
    **settings: Any,
) -> dict[str, Any]:
    """Train; on rank 1 the operations given are used at some steps. Steps that fail are left out."""
    torch.manual_seed(0)
    failing = {"now": False}
    model = wrap(
        Net(lambda h: in_model(h) if failing["now"] else torch.tanh(h), nn.Dropout(0.2), nn.BatchNorm1d(WIDTH))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    out, told = None, io.StringIO()
    given: dict[str, Any] = {"report": LogReport(told), "strict": True, "forensics": True, "clip": "norm"} | settings
    monitor = gradwatch.attach(model, **given) if watch else None
    for step in range(max(bad) + 3):
        failing["now"] = step in bad and dist.get_rank() == 1
        optimizer.zero_grad()
        out = model(torch.randn(ROWS, WIDTH, generator=generator))
        loss = (in_loss(out) if failing["now"] else out).pow(2).mean()
        if forwards > 1:
            loss = loss + model(torch.randn(ROWS, WIDTH, generator=generator)).pow(2).mean()
        loss.backward()
        if monitor is not None or step not in bad:
            optimizer.step()
    found: dict[str, Any] = {
        "parameters": [local_of(one.detach()).flatten().tolist() for one in model.parameters()],
        "buffers": [one.flatten().tolist() for one in model.buffers()],
        "generator": torch.get_rng_state().tolist(),
        "told": told.getvalue(),
    }
    if monitor is not None:
        monitor.detach()
        origin = next((one.origin for one in monitor.incidents if one.origin is not None), None)
        found["notes"] = monitor.notes
        found["skipped"] = int(monitor.history.skipped().sum())
        found["origin"] = (
            None if origin is None else [origin.op, origin.direction, origin.module, origin.rank, str(origin)]
        )
        found["way"] = None if origin is None else origin.found_by
        found["faithful"] = None if origin is None else origin.faithful
    return found


def found_by_each() -> dict[str, Any]:
    """Return what `gradwatch.find_nonfinite` says in each process, if the backward of rank 1 fails."""
    torch.manual_seed(0)
    model = sharded(Net(SQRT.run if dist.get_rank() else torch.tanh))
    try:
        with gradwatch.find_nonfinite(model):
            model(torch.randn(ROWS, WIDTH)).pow(2).mean().backward()
    except gradwatch.NonFiniteError as error:
        return {"told": str(error), "op": error.origin.op if error.origin is not None else None}
    return {}


def see() -> dict[str, Any]:
    """Play all trainings."""
    seen: dict[str, Any] = {}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", sharded)):
        seen[f"{name}, unwatched"] = train(wrap, watch=False)
        seen[f"{name}, in the model"] = train(wrap, in_model=LOG.run)
        seen[f"{name}, in the model's backward"] = train(wrap, in_model=SQRT.run)
        seen[f"{name}, in the loss's backward"] = train(wrap, in_loss=lambda out: SQRT.run(out.expand(-1, WIDTH)))
        seen[f"{name}, in the loss"] = train(wrap, in_loss=lambda out: LOG.run(out.expand(-1, WIDTH)))
        seen[f"{name}, one looks"] = train(wrap, in_model=LOG.run, forensics=dist.get_rank() == 1)
        dist.barrier()
    seen["FSDP2, twice, unwatched"] = train(sharded, forwards=2, watch=False)
    seen["FSDP2, twice, in the model's backward"] = train(sharded, in_model=SQRT.run, forwards=2, clip=NEVER)
    seen["FSDP2, often"] = train(sharded, in_model=SQRT.run, bad=(2, 4, 6, 8, 10))
    seen["FSDP2, found"] = found_by_each()
    with patch("gradwatch.forensics.spread._LARGEST", 0):
        seen["FSDP2, large, in the model"] = train(sharded, in_model=LOG.run)
        seen["FSDP2, large, in the model's backward"] = train(sharded, in_model=SQRT.run)
    return seen
