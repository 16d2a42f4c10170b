"""Small real trainings that the tests share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def data(n: int = 256, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs (n, width) and a smooth target (n, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    return x, torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2]


def mlp(
    depth: int = 3, width: int = 16, activation: type[nn.Module] = nn.ReLU, seed: int = 0, inputs: int = 8
) -> nn.Sequential:
    """Return a plain network with ``depth`` linear layers."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for _ in range(depth - 1):
        parts += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, 1))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    each: Callable[[int], Any] | None = None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    x_y: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> list[float]:
    """Train on random batches of 32; ``each`` is called after each backward with the step's number."""
    x, y = x_y if x_y is not None else data()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        batch = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(model(x[batch]), y[batch])
        loss.backward()
        if each is not None:
            each(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def step_in_backward(module: nn.Module, before: Callable[[Tensor], Any] | None = None) -> None:
    """Give each parameter an optimizer of its own that steps inside backward; ``before`` is called before each."""
    for parameter in module.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.01)

        def update(parameter: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            if before is not None:
                before(parameter)
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)


def true_norms(model: nn.Module) -> list[float]:
    """Return each parameter's gradient norm by a dumb loop in float64; NaN where there is no gradient."""
    return [true_norm(parameter.grad) for parameter in model.parameters()]


def true_norm(gradient: Tensor | None) -> float:
    """Return the L2 norm of a tensor of any kind by a dumb loop in float64; NaN for None."""
    if gradient is None:
        return float("nan")
    total = 0.0
    for value in gradient.to_dense().flatten().tolist():
        total += abs(value) ** 2
    return math.sqrt(total)
