"""What tempts several processes apart: short scenes, all run by one torchrun, each leaving its words as JSON.

Run as ``python -m tests.scenes FOLDER``.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch import device
from gradwatch.measure.sampling import Sampling
from gradwatch.probe.owners import Owners
from tests.torchrun import play
from tests.trainings import mlp, true_norm

Scene = Callable[[], dict[str, Any]]
SCENES: dict[str, Scene] = {}
FREE = device.reading_is_free


def scene(make: Scene) -> Scene:
    """Add a scene under its function's name."""
    SCENES[make.__name__] = make
    return make


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return this process's own batch."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    x = torch.randn(32, 8, generator=generator)
    return x, x[:, :1] * 2


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0, scale: float = 1.0) -> None:
    """Make one ordinary step."""
    x, y = batch(seed)
    optimizer.zero_grad()
    (scale * nn.functional.mse_loss(model(x), y)).backward()
    optimizer.step()


def as_on_a_device(*, later: bool) -> None:
    """Choose the path."""
    device.reading_is_free = (lambda _: False) if later else FREE  # type: ignore[assignment]


@scene
def one_optimizer_over_several_models() -> dict[str, Any]:
    """Their rows are exchanged in the same order everywhere, wherever the objects lie in memory."""
    models = [DistributedDataParallel(mlp(width=4 + 4 * number)) for number in range(4)]
    clutter: list[Any] = []
    monitors = []
    for model in models:
        clutter += [[object() for _ in range(1000 * dist.get_rank())]]
        monitors.append(gradwatch.attach(model, report=None, strict=True))
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.01)
    truth = []
    for number in range(3):
        x, y = batch(number)
        optimizer.zero_grad()
        loss: Any = sum(nn.functional.mse_loss(model(x), y) for model in models)
        loss.backward()
        truth.append([math.hypot(*[true_norm(p.grad) for p in model.parameters()]) for model in models])
        optimizer.step()
    for monitor in monitors:
        monitor.detach()
    return {"norms": [m.history.global_norm().tolist() for m in monitors], "truth": list(zip(*truth, strict=True))}


def _join(*, later: bool) -> dict[str, Any]:
    as_on_a_device(later=later)
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for number in range(3):
            step(model, optimizer, number)
        with model.join():
            for number in range(3 + 2 * dist.get_rank()):
                step(model, optimizer, number, scale=1e3 if number == 2 and dist.get_rank() else 1.0)
    notes = [note for note in monitor.notes if "join" in note]
    return {"rows": monitor.history.rows, "notes": notes, "processes": monitor.history.provenance.processes}


@scene
def uneven_batches() -> dict[str, Any]:
    """Under `model.join()` nobody waits for a process without batches."""
    return _join(later=False)


@scene
def uneven_batches_on_a_device() -> dict[str, Any]:
    """There neither."""
    return _join(later=True)


@scene
def failing_before_measuring() -> dict[str, Any]:
    """The others are told in the very step."""
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None)
    original, calls = Owners.get, [0]

    def failing(self: Owners, optimizer: torch.optim.Optimizer) -> Any:
        calls[0] += 1
        if calls[0] == 5 and dist.get_rank() == 0:
            raise OSError("lost")
        return original(self, optimizer)

    Owners.get = failing  # type: ignore[method-assign]
    for number in range(12):
        step(model, optimizer, number)
    Owners.get = original  # type: ignore[method-assign]
    monitor.detach()
    return {"rows": monitor.history.rows, "notes": monitor.notes}


@scene
def two_failures_on_devices() -> dict[str, Any]:
    """The second within the time that the news of the first takes."""
    as_on_a_device(later=True)
    model = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None)
    original, calls = Sampling.take_unread, [0]

    def failing(self: Sampling, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (5, 8)[dist.get_rank()]:
            raise OSError("lost")
        return original(self, *args, **kwargs)

    Sampling.take_unread = failing  # type: ignore[method-assign]
    for number in range(40):
        step(model, optimizer, number)
    Sampling.take_unread = original  # type: ignore[method-assign]
    monitor.detach()
    return {"notes": monitor.notes}


@scene
def no_gradient_in_one_process() -> dict[str, Any]:
    """FSDP1 with a frozen part may leave a process without any: it skips when the others do."""
    inner = mlp()
    inner[:4].requires_grad_(False)
    model = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for number in range(6):
            step(model, optimizer, number, scale=math.nan if number in (2, 3) else 1.0)
    return {"skipped": monitor.history.skipped().tolist()}


class Norm(nn.Module):
    """A block whose norm runs sequence parallel: its gradients are summands until somebody sums them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        """Return the block of ``x``."""
        return self.b(torch.relu(self.a(self.norm(x))))


@scene
def summands_are_clipped_too() -> dict[str, Any]:
    """The gradients of a sequence-parallel norm, by the same factor as all others."""
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    model = parallelize_module(
        Norm(),
        init_device_mesh("cpu", (2,)),
        {
            "norm": SequenceParallel(),
            "a": ColwiseParallel(input_layouts=Shard(1)),
            "b": RowwiseParallel(output_layouts=Shard(1)),
        },
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))[:, dist.get_rank() :: 2]
    with gradwatch.attach(
        model, clip=gradwatch.AutoClip(gradwatch.ClipNorm(1e-3), when="always"), report=None
    ) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
            gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
            left = math.hypot(*[gradient.full_tensor().norm().item() for gradient in gradients])
    return {"left": left, "notes": monitor.notes, "rows": monitor.history.rows}


def _sharded() -> Any:
    torch.manual_seed(0)
    return fully_shard(mlp(), mesh=init_device_mesh("cpu", (2,)))


def _clipped_parts(clip: str, *, later: bool, own: bool = False) -> dict[str, Any]:
    """Train shards for a few steps; return the norms of whole layers that the last step was made with."""
    as_on_a_device(later=later)
    model = _sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    policy = gradwatch.AutoClip(clip, when="always")
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        for number in range(6):
            x, y = batch(number)
            optimizer.zero_grad()
            (1e3 * nn.functional.mse_loss(model(x), y)).backward()
            if own:
                nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
        norms = [parameter.grad.full_tensor().norm().item() for parameter in model.parameters()]
    as_on_a_device(later=False)
    return {"norms": norms, "coefficients": monitor.history.clip_coefficient().tolist(), "notes": monitor.notes}


@scene
def clips_on_parts_of_layers() -> dict[str, Any]:
    """By the norms of whole layers, or not at all."""
    found: dict[str, Any] = {}
    for clip in ("layer norm", "norm then value", "percentile", "adagc"):
        found[clip] = _clipped_parts(clip, later=False)
        found[f"{clip}, later"] = _clipped_parts(clip, later=True)
    found["after an own clip"] = _clipped_parts("layer norm", later=False, own=True)
    try:
        gradwatch.attach(_sharded(), clip="agc", report=None)
    except gradwatch.UsageError as error:
        found["agc"] = str(error)
    return found


@scene
def a_dropped_model() -> dict[str, Any]:
    """Is freed, with its monitor."""
    inner = mlp()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradwatch.attach(model, report=None)
    for number in range(3):
        step(model, optimizer, number)
    alive = weakref.ref(inner)
    del inner, model, optimizer
    gc.collect()
    return {"freed": alive() is None}


def see() -> dict[str, Any]:
    """Play all scenes."""
    seen = {}
    for name, made in SCENES.items():
        as_on_a_device(later=False)
        seen[name] = made()
        dist.barrier()
    return seen


if __name__ == "__main__":
    play(see)
