"""The training modes in which gradwatch's numbers are proven: the rows of the tests and of docs/training-modes.md.

Each mode is a short training. It yields, just after the gradients of a step are complete, the true norms of that step,
computed by a dumb loop in float64; the monitor's row must agree with them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gradwatch
from tests.trainings import data, mlp, step_in_backward, true_norm, true_norms

mse = nn.functional.mse_loss


@dataclass
class Truth:
    """What a row must hold: ``norms`` by layer name, and where they differ from the defaults, loss and provenance."""

    norms: dict[str, float]
    loss: float | None = None
    source: str = "optimizer step"
    clipped: str = "no clip before it seen"
    left: float = 1.0


Run = Callable[[Callable[[nn.Module], gradwatch.Monitor]], Iterator[Truth]]


@dataclass(frozen=True)
class Mode:
    """One row of the matrix."""

    name: str
    recorded: str
    when: str
    run: Run = field(repr=False)


MODES: list[Mode] = []
AT_STEP = "at the optimizer step"


def mode(
    name: str, recorded: str = "the gradient that the optimizer uses", when: str = AT_STEP
) -> Callable[[Run], Run]:
    """Add a training to the matrix."""

    def add(run: Run) -> Run:
        MODES.append(Mode(name, recorded, when, run))
        return run

    return add


def norms_of(model: nn.Module, scale: float = 1.0) -> dict[str, float]:
    """Return the true norm of each parameter's gradient by name; tied parameters once."""
    return {name: true_norm(parameter.grad) / scale for name, parameter in model.named_parameters()}


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    """The plainest optimizer."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, **settings)


def batches(steps: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few batches of 32."""
    x, y = data()
    yield from list(zip(x.split(32), y.split(32), strict=True))[:steps]


def ordinary(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Truth]:
    """The loop that everybody writes."""
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse((forward or model)(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()


@mode("eager")
def _eager(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    yield from ordinary(model, sgd(model))


@mode("`zero_grad` after the step, to zero instead of None")
def _zero_after(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        loss = mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@mode("gradient accumulation", "the sum of all backwards, and the sum of their losses")
def _accumulation(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        optimizer.zero_grad()
        total = 0.0
        for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = mse(model(part), target) / 4
            loss.backward()
            total += loss.item()
        yield Truth(norms_of(model), total)
        optimizer.step()


def _by_closure(watch: Callable[[nn.Module], gradwatch.Monitor], make: Callable[[nn.Module], Any]) -> Iterator[Truth]:
    model = mlp()
    optimizer = make(model)
    watch(model)
    for x, y in batches():
        first: list[Truth] = []

        def closure(x: Tensor = x, y: Tensor = y, first: list[Truth] = first) -> Tensor:
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            first.append(Truth(norms_of(model), loss.item(), source="closure"))
            return loss

        optimizer.step(closure)
        yield first[0]


@mode("`optimizer.step(closure)`", when="inside the step, after the closure")
def _closure(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _by_closure(watch, sgd)


@mode(
    "accumulation whose last backward is inside `step(closure)` (Lightning)",
    "the sum of all backwards, and the sum of their losses",
    "inside the step, after the closure",
)
def _closure_accumulates(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        optimizer.zero_grad()
        parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
        losses: list[float] = []
        seen: list[dict[str, float]] = []

        def evaluate(part: int, parts: Any = parts, losses: list[float] = losses) -> Tensor:
            loss = mse(model(parts[part][0]), parts[part][1]) / 4
            loss.backward()
            losses.append(loss.item())
            return loss

        def last(seen: list[dict[str, float]] = seen, evaluate: Callable[[int], Tensor] = evaluate) -> Tensor:
            loss = evaluate(3)
            seen.append(norms_of(model))
            return loss

        for part in range(3):
            evaluate(part)
        optimizer.step(last)
        yield Truth(seen[0], sum(losses), source="closure")


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is commonly written."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.base = torch.optim.SGD(self.param_groups, lr=0.01)
        self.param_groups = self.base.param_groups
        self.old: list[Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb to where the loss is higher."""
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        self.old = [p.detach().clone() for p in held]
        for p in held:
            p.add_(p.grad, alpha=(0.05 / (norm + 1e-12)).item())
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Come back, and step by the gradient from there."""
        for p, before in zip((p for group in self.param_groups for p in group["params"]), self.old, strict=True):
            p.copy_(before)
        self.base.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do both."""
        evaluate = torch.enable_grad()(closure)
        evaluate()
        self.first_step()
        loss = evaluate()
        self.second_step()
        return loss


SHARP = "the gradient that moves the weights: the one at the perturbed weights, with its loss"


@mode("SAM by `first_step` and `second_step`", SHARP, "at the step of the inner optimizer")
def _sam(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = SAM(model.parameters())
    watch(model)
    for x, y in batches():
        mse(model(x), y).backward()
        optimizer.first_step()
        loss = mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.second_step()


@mode("SAM by `step(closure)`", SHARP, "at the step of the inner optimizer")
def _sam_closure(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = SAM(model.parameters())
    watch(model)
    for x, y in batches():
        seen: list[Truth] = []

        def closure(x: Tensor = x, y: Tensor = y, seen: list[Truth] = seen) -> Tensor:
            loss = mse(model(x), y)
            loss.backward()
            seen.append(Truth(norms_of(model), loss.item()))
            return loss

        optimizer.step(closure)
        yield seen[1]


@mode("LBFGS", "the first evaluation of the line search", "inside the step, after the first closure")
def _lbfgs(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _by_closure(watch, lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4))


def _scaled(
    watch: Callable[[nn.Module], gradwatch.Monitor],
    *,
    fused: bool,
    unscale: bool,
    growth: int = 2000,
    clip_before: bool = False,
) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
    watch(model)
    for x, y in batches(8):
        optimizer.zero_grad()
        loss = mse(model(x), y)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        truth = Truth(norms_of(model, scale), loss.item())
        if clip_before:
            before = norms_of(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            truth.left = math.hypot(*norms_of(model).values()) / math.hypot(*before.values())
            truth.clipped = "before the user's clip"
        if unscale:
            scaler.unscale_(optimizer)
        yield truth
        scaler.step(optimizer)
        scaler.update()


UNSCALED = "gradient and loss without the loss scale"


@mode("GradScaler", UNSCALED)
def _scaler(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=False, unscale=False)


@mode("GradScaler and `unscale_`", UNSCALED)
def _scaler_unscaled(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=False, unscale=True)


@mode("GradScaler, fused optimizer", UNSCALED)
def _scaler_fused(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=True, unscale=False)


@mode("GradScaler and `unscale_`, fused optimizer", UNSCALED)
def _scaler_fused_unscaled(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=True, unscale=True)


@mode("GradScaler whose scale grows", UNSCALED)
def _scaler_grows(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=False, unscale=False, growth=2)


BEFORE_UNSCALING = "gradient and loss before your clip and without the loss scale; the mistake is noted"


@mode("your own clip before `unscale_`", BEFORE_UNSCALING, "at the clip")
def _scaler_clipped_too_early(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=False, unscale=True, clip_before=True)


@mode("your own clip before the GradScaler unscales inside its step", BEFORE_UNSCALING, "at the clip")
def _scaler_clipped_without_unscale(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=False, unscale=False, clip_before=True)


@mode("your own clip before a fused optimizer unscales", BEFORE_UNSCALING, "at the clip")
def _scaler_fused_clipped_too_early(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _scaled(watch, fused=True, unscale=False, clip_before=True)


@mode("GradScaler that leaves steps out", "the steps that are made; ten left out in a row are an incident")
def _scaler_overflows(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**122)
    watch(model)
    for x, y in batches(8):
        optimizer.zero_grad()
        loss = 1e3 * mse(model(x), y)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        truth = Truth(norms_of(model, scale), loss.item())
        if all(math.isfinite(norm) for norm in truth.norms.values()):
            yield truth
        scaler.step(optimizer)
        scaler.update()


def _autocast(watch: Callable[[nn.Module], gradwatch.Monitor], dtype: torch.dtype) -> Iterator[Truth]:
    model = mlp()
    watch(model)

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(x).float()

    yield from ordinary(model, sgd(model), forward)


@mode("autocast, bfloat16")
def _autocast_bfloat16(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _autocast(watch, torch.bfloat16)


@mode("autocast, float16")
def _autocast_float16(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _autocast(watch, torch.float16)


def _pure(watch: Callable[[nn.Module], gradwatch.Monitor], dtype: torch.dtype) -> Iterator[Truth]:
    model = mlp().to(dtype)
    watch(model)
    yield from ordinary(model, sgd(model), lambda x: model(x.to(dtype)).float())


@mode("parameters in bfloat16", "norms summed in float32")
def _pure_bfloat16(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _pure(watch, torch.bfloat16)


@mode("parameters in float16", "norms summed in float32")
def _pure_float16(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _pure(watch, torch.float16)


@mode("parameters in float64", "norms summed in float64")
def _pure_float64(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _pure(watch, torch.float64)


def _clipped(watch: Callable[[nn.Module], gradwatch.Monitor], clip: Callable[[nn.Module], Any]) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        before = norms_of(model)
        clip(model)
        left = math.hypot(*norms_of(model).values()) / math.hypot(*before.values())
        yield Truth(before, loss.item(), clipped="before the user's clip", left=left)
        optimizer.step()


BEFORE = "the gradient before your clip; as clip coefficient, the share of its norm that was left"


@mode("your own `clip_grad_norm_`", BEFORE, "at the clip")
def _user_norm(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _clipped(watch, lambda model: clip_grad_norm_(model.parameters(), 0.05))


@mode(
    "`clip_grad_norm_` without a bound, to log the norm, and a clip of your own after it or before it",
    BEFORE,
    "at the clip",
)
def _user_logs_and_clips(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    def clip(model: nn.Module) -> None:
        for bound in (math.inf, 0.05, math.inf):
            clip_grad_norm_(model.parameters(), bound)

    yield from _clipped(watch, clip)


@mode(
    "`clip_grad_norm_` without a bound, to log the norm", "the gradient that the optimizer uses; it counts as no clip"
)
def _user_logs(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    for truth in _clipped(watch, lambda model: clip_grad_norm_(model.parameters(), math.inf)):
        yield replace(truth, clipped="no clip before it seen")


@mode("your own `clip_grad_value_`", BEFORE, "at the clip")
def _user_value(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _clipped(watch, lambda model: clip_grad_value_(model.parameters(), 0.01))


@mode("your own `get_total_norm` and `clip_grads_with_norm_`", BEFORE, "at the clip")
def _user_total(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    def clip(model: nn.Module) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.05, nn.utils.get_total_norm(gradients))

    yield from _clipped(watch, clip)


def _checkpointed(watch: Callable[[nn.Module], gradwatch.Monitor], *, reentrant: bool) -> Iterator[Truth]:
    model = mlp(depth=4)
    watch(model)

    def forward(x: Tensor) -> Tensor:
        for part in model:
            x = checkpoint(part, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)
        return x

    yield from ordinary(model, sgd(model), forward)


@mode("activation checkpointing, not reentrant")
def _checkpoint(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _checkpointed(watch, reentrant=False)


@mode("activation checkpointing, reentrant")
def _checkpoint_reentrant(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _checkpointed(watch, reentrant=True)


@mode("`torch.compile` of the model: no graph break, no recompile")
def _compiled_model(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    torch._dynamo.reset()
    model = mlp()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    watch(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield from ordinary(model, sgd(model), compiled)


@mode("`torch.compile` of the optimizer: as many graphs and breaks as without")
def _compiled_optimizer(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    torch._dynamo.reset()
    model = mlp()
    optimizer = sgd(model)
    watch(model)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        step()


@mode("`torch.compile` of the whole step: as many graphs and breaks as without")
def _compiled_step(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    torch._dynamo.reset()
    model = mlp()
    optimizer = sgd(model)
    watch(model)

    @torch.compile(backend="aot_eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for x, y in batches():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo warns of what it does itself after the graph break at backward
            loss = step(x, y)
        yield Truth(norms_of(model), loss.item())


@mode("optimizer in backward", "all of its steps in one backward, as one row; auto-clip only watches", "after backward")
def _in_backward(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    seen: dict[Tensor, float] = {}

    def see(parameter: Tensor) -> None:
        seen[parameter] = true_norm(parameter.grad)

    step_in_backward(model, before=see)
    watch(model)
    for x, y in batches():
        loss = mse(model(x), y)
        loss.backward()
        yield Truth({n: seen[p] for n, p in model.named_parameters()}, loss.item(), source="optimizer in backward")


@mode("two optimizers over one model", "a row for each; missing if the other owns the layer")
def _two_optimizers(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    body, head = sgd(model[:4]), torch.optim.Adam(model[4].parameters(), lr=1e-3)
    for x, y in batches():
        model.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        norms = norms_of(model)
        yield Truth({n: norms[n] if not n.startswith("4") else math.nan for n in norms}, loss.item())
        body.step()
        yield Truth({n: norms[n] if n.startswith("4") else math.nan for n in norms}, loss.item())
        head.step()


@mode("two optimizers that share parameters (GAN)", "a row for each, with the gradients that each uses")
def _shared_parameters(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    trunk, one, other = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 1)
    model = nn.ModuleList([trunk, one, other])
    optimizers = [sgd(nn.ModuleList([trunk, head])) for head in (one, other)]
    watch(model)
    for x, y in batches():
        for head, optimizer in zip((one, other), optimizers, strict=True):
            model.zero_grad()
            loss = mse(head(torch.tanh(trunk(x))), y)
            loss.backward()
            yield Truth(norms_of(model), loss.item())
            optimizer.step()


@mode("generator and discriminator in one module (GAN)", "a row for each, with its own layers and its own loss")
def _gan(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    generator, judge = mlp(depth=2), mlp(depth=2, inputs=1, seed=1)
    model = nn.ModuleList([generator, judge])
    optimizers = [sgd(generator), sgd(judge)]
    watch(model)

    def own(place: int) -> dict[str, float]:
        return {n: norm if n.startswith(str(place)) else math.nan for n, norm in norms_of(model).items()}

    for x, y in batches():
        optimizers[1].zero_grad()
        loss = mse(judge(y), torch.ones(len(y), 1)) + judge(generator(x).detach()).square().mean()
        loss.backward()
        yield Truth(own(1), loss.item())
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss = mse(judge(generator(x)), torch.ones(len(y), 1))
        loss.backward()  # gives the discriminator a gradient as well, which is cleared before its next step
        yield Truth(own(0), loss.item())
        optimizers[0].step()


@mode("stochastic depth", "missing if a block was left out")
def _depth(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)])
    watch(model)
    turn = count()

    def forward(x: Tensor) -> Tensor:
        left_out = next(turn) % 4
        for place in (0, 1):
            x = x + torch.tanh(model[place](x)) if left_out != place else x
        last: Tensor = model[2](x)
        return last

    yield from ordinary(model, sgd(model), forward)


def _made_by_hand(watch: Callable[[nn.Module], gradwatch.Monitor], *, clip: bool, in_place: bool) -> Iterator[Truth]:
    model = mlp()
    optimizer = sgd(model)
    monitor = watch(model)
    for x, y in batches():
        loss = mse(model(x), y)
        monitor.loss(loss)
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            if in_place and parameter.grad is not None:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient
        norms, total = norms_of(model), math.hypot(*norms_of(model).values())
        if clip:
            clip_grad_norm_(model.parameters(), 0.05)
        left = math.hypot(*norms_of(model).values()) / total
        yield Truth(
            norms, loss.item(), clipped="before the user's clip" if clip else "no clip before it seen", left=left
        )
        optimizer.step()


BY_HAND = "the gradient that you set in `.grad`; the loss from `monitor.loss`"


@mode("gradients put into place by hand: gradient surgery, DP-SGD, `torch.func`", BY_HAND)
def _by_hand_new(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _made_by_hand(watch, clip=False, in_place=False)


@mode("the same, then your own `clip_grad_norm_`", "the gradient before your clip", "at the clip")
def _by_hand_clipped(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _made_by_hand(watch, clip=True, in_place=False)


@mode("the same, written over the last gradient in place", "the gradient before your clip", "at the clip")
def _by_hand_in_place(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    yield from _made_by_hand(watch, clip=True, in_place=True)


@mode("a subclass that calls `super().step()`", "one row for one step")
def _super_step(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    class Subclass(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # an instance of the base class wraps its step as well
    model = mlp()
    watch(model)
    yield from ordinary(model, Subclass(model.parameters(), lr=0.01))


@mode("gradient penalty (double backward), `autograd.grad`", "the gradient of loss and penalty together")
def _penalty(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp(activation=nn.Tanh)
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        optimizer.zero_grad()
        x = x.clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        loss = mse(output, y) + slope.norm()
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()


@mode("a backward that raises, then training goes on", "the steps that are made")
def _raising(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    class Raise(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, *__: Tensor) -> Tensor:
            raise OSError

    model = mlp()
    optimizer = sgd(model)
    watch(model)
    for x, y in batches():
        with suppress(OSError):
            mse(model[2:](Raise.apply(model[:2](x))), y).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()


@mode("frozen layers, later unfrozen", "missing while frozen")
def _unfrozen(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    model[:4].requires_grad_(False)
    watch(model)
    yield from ordinary(model, sgd(model))
    model.requires_grad_(True)
    yield from ordinary(model, sgd(model))


@mode("tied weights", "one layer, the summed gradient once")
def _tied(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp(depth=4)
    model[4].weight = model[2].weight
    watch(model)
    yield from ordinary(model, sgd(model))


@mode("parametrizations, added before and after attach", "the original parameters")
def _parametrized(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    parametrizations.weight_norm(model[0])
    watch(model)
    yield from ordinary(model, sgd(model))

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(model[2], "weight", Doubled())
    names = dict(zip((n for n, _ in model.named_parameters()), (n for n, _ in model.named_parameters()), strict=True))
    names["2.parametrizations.weight.original"] = "2.weight"  # the same parameter keeps its column
    for truth in ordinary(model, sgd(model)):
        truth.norms = {names[name]: norm for name, norm in truth.norms.items()}
        yield truth


@mode("adapters added after attach", "their norms, in new columns; their past is missing")
def _adapters(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    optimizer = sgd(model)
    yield from ordinary(model, optimizer)

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) + self.up(self.down(x))

    adapted = model[2] = Adapted(model[2])
    optimizer.add_param_group({"params": [adapted.down.weight, adapted.up.weight]})
    for truth in ordinary(model, optimizer):
        truth.norms = {name.replace(".inner", ""): norm for name, norm in truth.norms.items()}
        yield truth


@mode("`load_state_dict(assign=True)`", "the new parameters, in the old columns")
def _assigned(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    yield from ordinary(model, sgd(model))
    model.load_state_dict(mlp(seed=1).state_dict(), assign=True)
    yield from ordinary(model, sgd(model))


@mode("sparse embeddings", "rows that occur twice count once, with their sum")
def _sparse(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Flatten(), nn.Linear(24, 1))
    optimizer = sgd(model)
    watch(model)
    words = torch.randint(0, 10, (4, 32, 3), generator=torch.Generator().manual_seed(0))
    for (_, y), batch in zip(batches(), words, strict=True):
        optimizer.zero_grad()
        loss = mse(model(batch), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()


@mode("complex parameters", "real and imaginary parts together")
def _complex(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.complex64), nn.Linear(4, 1, dtype=torch.complex64))
    watch(model)
    yield from ordinary(model, sgd(model), lambda x: model(x.to(torch.complex64)).abs())


@mode("empty parameters", "0")
def _empty(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    watch(model)
    optimizer = sgd(model)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse(model(x), y) + model.nothing.sum()  # type: ignore[operator]
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()


@mode("parameters without a gradient this step", "missing, not zero")
def _unused(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    trunk, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
    model = nn.ModuleList([trunk, heads])
    optimizer = sgd(model)
    watch(model)
    turn = count()
    yield from ordinary(model, optimizer, lambda x: heads[next(turn) % 2](torch.tanh(trunk(x))))


@mode("evaluation between steps", "only the steps")
def _evaluation(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    optimizer = sgd(model)
    for truth in ordinary(model, optimizer):
        with torch.no_grad():
            mse(model(data()[0]), data()[1])
        yield truth


@mode("one optimizer over watched and unwatched models", "only the watched layers")
def _half_watched(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model, other = mlp(), mlp(seed=1)
    watch(model)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    yield from ordinary(model, optimizer, lambda x: model(x) + other(x))


@mode("two monitors on two models", "each model by its own monitor")
def _two_monitors(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model, other = mlp(), mlp(seed=1)
    expected: list[list[float]] = []
    with gradwatch.attach(other, report=None, strict=True) as second:
        watch(model)
        optimizer, others = sgd(model), sgd(other)
        for truth in ordinary(model, optimizer):
            yield truth
            mse(other(data()[0]), data()[1]).backward()
            expected.append(true_norms(other))
            others.step()
            others.zero_grad()
    np.testing.assert_allclose(second.history.grad_norm(), expected, rtol=1e-6)


@mode("a loop without any optimizer", "from the second backward on", "after backward")
def _without_optimizer(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    for step, (x, y) in enumerate(batches()):
        model.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        if step:
            yield Truth(norms_of(model), loss.item(), source="end of backward")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)  # type: ignore[operator]


@mode("`monitor.step()`", when="where you call it")
def _explicit(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    monitor = watch(model)
    for x, y in batches():
        model.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item(), source="monitor.step()")
        monitor.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)  # type: ignore[operator]


@mode("large layers in float32", "norms summed in chunks; torch's own sum is off by 1e-5 and more")
def _large(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = nn.Sequential(nn.Linear(8, 60_000), nn.Linear(60_000, 1))
    watch(model)
    yield from ordinary(model, torch.optim.SGD(model.parameters(), lr=1e-6))


@mode("finite gradients near 1e20, whose squares overflow float32", "their true norm")
def _huge(watch: Callable[[nn.Module], gradwatch.Monitor]) -> Iterator[Truth]:
    model = mlp()
    watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-25)
    for x, y in batches():
        optimizer.zero_grad()
        loss = 1e20 * mse(model(x), y)
        loss.backward()
        yield Truth(norms_of(model), loss.item())
        optimizer.step()
