"""Steps of two processes under FSDP2's policies of mixed precision that are not finite, or are repeated as they were.

Run as ``python -m tests.torchrun 2 tests.mixed_precision FOLDER``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import gradwatch
from benchmarks.forensics.causes import NARROW, ROWS, WIDTH, Net
from gradwatch.forensics.call import outputs_in
from gradwatch.forensics.spread import whole
from gradwatch.forensics.standins import generators_kept, stand_ins
from tests.forensic_processes import LOG, SQRT, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Policies = dict[str, MixedPrecisionPolicy]

WIDE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
PLAIN = MixedPrecisionPolicy()


def policy(param: torch.dtype | None = None, output: torch.dtype | None = None, **more: Any) -> MixedPrecisionPolicy:
    """Return a policy that reduces gradients in float32."""
    return MixedPrecisionPolicy(**({"param_dtype": param, "output_dtype": output, "reduce_dtype": WIDE} | more))


def under(root: MixedPrecisionPolicy, *blocks: MixedPrecisionPolicy, **more: Any) -> Callable[[nn.Module], nn.Module]:
    """Return what shards a `Net`: its blocks under policies of their own if there are any, its normalisation in float32."""

    def wrap(model: nn.Module) -> nn.Module:
        own = iter(blocks)
        for block in model.blocks:  # type: ignore[union-attr]
            if isinstance(block, nn.BatchNorm1d):
                fully_shard(block, mp_policy=policy(WIDE, root.param_dtype), **more)
            elif next(block.parameters(), None) is not None:
                fully_shard(block, mp_policy=next(own, root), **more)
        return fully_shard(model, mp_policy=root, **more)  # type: ignore[return-value]

    return wrap


WRAPPERS = {
    "bfloat16": under(policy(BRAIN)),
    "float16": under(policy(HALF)),
    "policies of their own": under(policy(BRAIN, WIDE), policy(WIDE), policy(HALF, output=BRAIN)),
}


# One step.


def step(
    model: nn.Module,
    wrap: Callable[[nn.Module], nn.Module],
    x: Tensor,
    *,
    loss: Callable[[Tensor], Tensor] = lambda out: out.float().pow(2).mean(),
    early: bool = False,
) -> dict[str, Any]:
    """Make a step; return what is said of it. If ``early``, the model is attached before it is sharded."""
    monitor = gradwatch.attach(model, report=None, strict=True, forensics=True) if early else None
    model = wrap(model)
    monitor = monitor or gradwatch.attach(model, report=None, strict=True, forensics=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    out = model(x)
    loss(out).backward()
    optimizer.step()
    monitor.detach()
    origin = next((one.origin for one in monitor.incidents if one.origin is not None), None)
    if origin is None:
        return {"notes": monitor.notes}
    told = {name: getattr(origin, name) for name in ("op", "direction", "module", "faithful", "found_by", "subject")}
    return told | {"line": str(origin), "details": list(origin.details), "advice": list(origin.advice), "notes": []}


def net(run: Callable[[Tensor], Tensor] = torch.tanh) -> Net:
    """Return a model with the same weights in all processes."""
    torch.manual_seed(0)
    return Net(run)


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield steps that fail because of the dtype in which something is cast."""
    here = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(ROWS, WIDTH, generator=here)
    half = under(policy(HALF))
    last = under(policy(HALF, WIDE), policy(HALF), policy(HALF))
    large = x.clone()
    large[3] = 1e5 if dist.get_rank() else 1.0
    yield "an input", step(net(), half, large)
    model = net()
    model.blocks[0].run = lambda h: h * 1e6  # type: ignore[assignment]
    yield "an input of a module", step(model, under(policy(WIDE), policy(WIDE), policy(HALF, WIDE)), x)
    model = net()
    with torch.no_grad():
        model.blocks[1].linear.weight[0, 3] = 1e5  # type: ignore[union-attr, operator]
    yield "a weight", step(model, half, x)
    model = net()
    with torch.no_grad():
        model.blocks[1].linear.weight[0, 3] = torch.nan  # type: ignore[union-attr, operator]
    yield "a weight that is NaN", step(model, half, x)
    factor = 1e9 if dist.get_rank() else 1.0
    yield "a reduction", step(net(), under(policy(reduce_dtype=HALF)), x, loss=lambda out: out.pow(2).mean() * factor)
    yield (
        "a gradient",
        step(net(), last, x, loss=lambda out: out.pow(2).mean() * 1e9),
    )
    yield "attached before", step(net(SQRT.run), last, x, early=True)
    replicated = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicated", "sharded"))
    ways: dict[str, dict[str, Any]] = {
        "on the host": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "replicated": {"mesh": replicated},
    }
    for name, more in ways.items():
        model = net()
        with torch.no_grad():
            model.blocks[1].linear.weight[0, 3] = 1e5  # type: ignore[union-attr, operator]
        yield f"a weight {name}", step(model, under(policy(HALF), **more), x)
    left = [SQRT.run]  # for the original
    yield "another result", step(net(lambda h: left.pop()(h) if left else torch.cos(h)), half, x)


# Repetitions of a step that is finite.


@dataclass
class Read:
    """What `Reader` returns."""

    first: Tensor
    others: list[Tensor]


class Part(nn.Module):
    """A layer whose inputs are a tensor, a list in a dict and an argument by name; it returns a dict."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)
        self.checkpointed = checkpointed

    def run(self, x: Tensor, more: dict[str, Any], scale: Tensor) -> Tensor:
        """Compute."""
        return torch.tanh(self.linear(x) * scale + self.drop(more["list"][0]) * more["count"])

    def forward(self, x: Tensor, more: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
        """Run."""
        args = (x, more, scale)
        h = checkpoint(self.run, *args, use_reentrant=False) if self.checkpointed else self.run(*args)
        return {"h": h, "others": [h * 2, (more["count"], x.clone())]}


class Reader(nn.Module):
    """Two such layers, a normalisation, a buffer and a head."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second = Part(checkpointed=checkpointed), Part(checkpointed=checkpointed)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("offset", torch.linspace(0, 1, WIDTH))

    def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> Read:
        """Run."""
        count = torch.arange(WIDTH)
        one = self.first(batch["x"], {"list": [batch["y"]], "count": count}, scale=scale)
        two = self.second(one["h"], {"list": [one["others"][0] + self.offset], "count": count}, scale=scale)
        h = self.norm(two["h"] + two["others"][1][1])
        return Read(self.head(h.to(self.head.weight.dtype)), [h, two["h"]])


def _loss(read: Read) -> Tensor:
    return torch.stack([one.double().pow(2).mean() for _, one in outputs_in(read)]).sum()


def repeated(policies: Policies, *, checkpointed: bool = False, together: bool = False) -> dict[str, Any]:
    """Make a step and repeat it on stand-ins; return which outputs and gradients are the same to the bit.

    All processes have the same data, so that the mean of their gradients is that of each.
    """
    torch.manual_seed(0)
    model = Reader(checkpointed=checkpointed)
    if together:
        fully_shard([model.second, model.norm], mp_policy=policies["second"])
    for name in ("first", "second", "norm"):
        if name in policies and not together:
            fully_shard(getattr(model, name), mp_policy=policies[name])
    fully_shard(model, mp_policy=policies["root"])
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator).half()
    state = generator.get_state()
    with generators_kept(state):
        read = model({"x": x, "y": y}, scale=torch.tensor(1.7))
        _loss(read).backward()
    before: list[Any] = [one.grad for one in model.parameters()]
    before = [one.full_tensor() for one in before]
    hooks = [dict(one._forward_hooks) | dict(one._forward_pre_hooks) for one in model.modules()]
    with whole(model) as overflowed, stand_ins(model) as weights, generators_kept(state):
        again = model({"x": x, "y": y}, scale=torch.tensor(1.7))
        _loss(again).backward()
        now: list[Any] = [one.grad for one in weights]
    pairs = zip(outputs_in(read), outputs_in(again), strict=True)
    return {
        "outputs": [one.dtype == other.dtype and torch.equal(one, other) for (_, one), (_, other) in pairs],
        "gradients": [torch.equal(one, other.to(one.dtype)) for one, other in zip(before, now, strict=True)],
        "dtypes": sorted({str(one.dtype).removeprefix("torch.") for one in now}),
        "overflowed": len(overflowed),
        "hooks": hooks == [dict(one._forward_hooks) | dict(one._forward_pre_hooks) for one in model.modules()],
    }


REPEATED: dict[str, tuple[Policies, list[str]]] = {
    "no policy": ({"root": PLAIN, "first": PLAIN, "second": PLAIN}, ["float32"]),
    "bfloat16": ({"root": policy(BRAIN), "first": policy(BRAIN), "second": policy(BRAIN)}, ["bfloat16"]),
    "float16": ({"root": policy(HALF), "second": policy(HALF)}, ["float16"]),
    "policies of their own": (
        {
            "root": policy(BRAIN, WIDE),
            "first": policy(HALF, BRAIN),
            "second": policy(WIDE, torch.float64),
            "norm": policy(WIDE),
        },
        ["bfloat16", "float16", "float32"],
    ),
    "inputs as they are": (
        {
            "root": policy(BRAIN, WIDE, cast_forward_inputs=False),
            "first": policy(BRAIN),
            "second": policy(HALF),
            "norm": policy(WIDE),
        },
        ["bfloat16", "float16", "float32"],
    ),
}


def see() -> dict[str, Any]:
    """Play all of it."""
    seen: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        seen[f"{name}, unwatched"] = train(wrap, watch=False)
        seen[f"{name}, in the model"] = train(wrap, in_model=LOG.run)
        seen[f"{name}, in the model's backward"] = train(wrap, in_model=SQRT.run)
        seen[f"{name}, in the loss's backward"] = train(wrap, in_loss=lambda out: SQRT.run(out.expand(-1, WIDTH)))
        seen[f"{name}, in a product"] = train(wrap, in_model=NARROW.run)
    with patch("gradwatch.forensics.spread._LARGEST", 0):
        seen["bfloat16, large, in the model"] = train(WRAPPERS["bfloat16"], in_model=LOG.run)
    seen |= {f"step: {name}": found for name, found in steps()}
    for name, (policies, _) in REPEATED.items():
        seen[f"repeated: {name}"] = repeated(policies)
        seen[f"repeated, checkpointed: {name}"] = repeated(policies, checkpointed=True)
    seen["repeated, together: bfloat16"] = repeated(REPEATED["bfloat16"][0], together=True)
    return seen
