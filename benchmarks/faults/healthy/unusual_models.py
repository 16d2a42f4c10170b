"""Healthy trainings of unusual models: mixtures, equations, nets that make nets, and nets that are pruned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks.faults.data import curve, rings
from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


class _Experts(nn.Module):
    """Each row goes to one of six experts; those that no row goes to have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6)
        self.experts = nn.ModuleList(mlp(8, 24, 1) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.gate(x).softmax(1)
        share, chosen = shares.max(1)
        out = torch.zeros(len(x), 1)
        for place, expert in enumerate(self.experts):
            rows = (chosen == place).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, share[rows].unsqueeze(1) * expert(x[rows]))
        used = functional.one_hot(chosen, 6).float().mean(0)
        return out, 6 * (used * shares.mean(0)).sum()


def _mixture(run: Run) -> None:
    x, y = curve(1000, noise=0.05)
    model = _Experts()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(x: Tensor, y: Tensor) -> Any:
        out, balance = model(x)
        return _square(out, y) + 0.05 * balance

    fit(run, model, optimizer, over(batches(12, x, y), loss))


def _equation(run: Run) -> None:
    """Solves u'' = -pi^2 sin(pi x) on [0, 1], u = 0 at both ends."""
    model = mlp(1, 24, 24, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    ends = torch.tensor([[0.0], [1.0]])

    def loss() -> Any:
        x = torch.rand(64, 1, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        residual = bend + math.pi**2 * torch.sin(math.pi * x)
        return (residual**2).mean() + 20 * (model(ends) ** 2).mean()

    fit(run, model, optimizer, loss)


def _meta(run: Run) -> None:
    """Sines of random amplitude: one inner step each, and second-order gradients of what it leaves."""
    model = mlp(1, 40, 40, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss() -> Tensor:
        total = torch.zeros(())
        for _ in range(4):
            x, size, phase = 10 * torch.rand(20, 1) - 5, 0.5 + 2 * torch.rand(()), math.pi * torch.rand(())
            y = size * torch.sin(x + phase)
            weights: dict[str, Tensor] = dict(model.named_parameters())
            inner = _square(functional_call(model, weights, (x[:10],)), y[:10])
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            moved = {name: value - 0.05 * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)}
            total = total + _square(functional_call(model, moved, (x[10:],)), y[10:]) / 4
        return total

    fit(run, model, optimizer, loss)


class _Sine(nn.Module):
    def __init__(self, inputs: int, outputs: int, reach: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.uniform_(self.linear.weight, -reach, reach)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(20 * self.linear(x))


def _picture(run: Run) -> None:
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24))
    y = (torch.sin(9 * grid[:, :1]) * torch.cos(7 * grid[:, 1:]) + (grid.norm(dim=1, keepdim=True) < 0.5)).float()
    reach = math.sqrt(6 / 48) / 20
    model = nn.Sequential(_Sine(2, 48, 0.5), _Sine(48, 48, reach), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    fit(run, model, optimizer, lambda: _square(model(grid), y))


class _Hyper(nn.Module):
    """A net whose weights another net makes, for each task anew."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = mlp(2, 32, 1 * 16 + 16 + 16 + 1)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        first, bias, second, last = self.maker(task).split([16, 16, 16, 1], 1)
        hidden = torch.tanh(x.unsqueeze(2) * first.unsqueeze(1) * 3 + bias.unsqueeze(1) * 3)
        return torch.as_tensor((hidden * second.unsqueeze(1)).sum(2) + last)


def _hyper(run: Run) -> None:
    model = _Hyper()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Tensor:
        task, x = torch.rand(32, 2), 4 * torch.rand(32, 16) - 2
        return _square(model(task, x), (0.5 + task[:, :1]) * torch.sin(2 * x + 2 * task[:, 1:]))

    fit(run, model, optimizer, loss)


def _ensemble(run: Run) -> None:
    x, y = curve(600, noise=0.1)
    model = nn.ModuleList(mlp(8, 24, 1) for _ in range(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        wrong = [_square(member(x), y) for member in model if torch.rand(()) < 0.5]  # each sees half of the batches
        return torch.stack(wrong).sum() if wrong else 0 * model[0](x).sum()

    fit(run, model, optimizer, over(batches(64, x, y), loss))


def _saddle(run: Run) -> None:
    """A deep linear net from small weights: it learns one direction after another, with rests between."""
    aim = torch.linalg.qr(torch.randn(8, 8))[0] * torch.tensor([4.0, 2.0, 1.0, 0, 0, 0, 0, 0]).unsqueeze(1)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.07)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)

    def loss() -> Tensor:
        x = torch.randn(256, 8)
        return _square(model(x), x @ aim.T)

    fit(run, model, optimizer, loss, clip=2.0)


def _pruned(run: Run) -> None:
    """Half of the weights are set to zero at step 150, and stay so."""
    x, y = rings(1000)
    model = mlp(2, 48, 48, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    masks: dict[str, Tensor] = {}
    data = batches(64, x, y)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        inputs, classes = next(data)
        loss = _entropy(model(inputs), classes)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if run.made == 150 and weight.dim() == 2:
                    masks[name] = (weight.abs() >= weight.abs().quantile(0.5)).float()
                if name in masks:
                    weight.mul_(masks[name])
        run.step(loss)


class _Flow(nn.Module):
    """One small net, applied twelve times with a step of 1/6: a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = mlp(4, 32, 4, act=nn.Tanh), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = functional.pad(x, (0, 2))
        for _ in range(12):
            x = x + self.field(x) / 6
        return self.head(x)


def _neural_ode(run: Run) -> None:
    x, y = rings(800)
    model = _Flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)))


PROGRAMS: tuple[Program, ...] = (
    healthy("mixture of experts", _mixture, "Experts to which no row goes have no gradient in that step."),
    healthy(
        "differential equation", _equation, "Third-order gradients, and a loss that starts near 50 and falls by orders."
    ),
    healthy("learning to learn", _meta, "Second-order gradients, and a loss that depends on the tasks drawn."),
    healthy("picture by sines", _picture, "Frequencies of 20 make steep gradients on small weights."),
    healthy("weights made by a net", _hyper, "One net's output is another's weights."),
    healthy(
        "ensemble, half asleep",
        _ensemble,
        "Members sleep at random, so their gradients come and go and the loss jumps.",
    ),
    healthy(
        "deep linear net from small weights", _saddle, "A plateau at the start, and more between the directions.", 400
    ),
    healthy("pruned midway", _pruned, "At step 150 half of the weights become zero and the loss jumps."),
    healthy("one block twelve times", _neural_ode, "Gradients of twelve passes add up in one block."),
)
