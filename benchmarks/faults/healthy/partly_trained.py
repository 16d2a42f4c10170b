"""Healthy trainings in which parts of the model rest: frozen, unfrozen one by one, adapted, or seldom asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import centred_images, digits
from benchmarks.faults.loops import batches, fit, over, train_before
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _unfreezing(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 64, 64, 10)
    mirrored = x.reshape(-1, 8, 8).flip(2).flatten(1)
    before = torch.optim.Adam(model.parameters(), lr=0.003)
    train_before(before, over(batches(64, x, y), lambda x, y: _entropy(model(x), y)), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    data = batches(64, mirrored, y)

    def loss() -> Tensor:
        for depth, layer in enumerate(reversed(layers)):  # the head is free at once, and one more layer every 60 steps
            layer.requires_grad_(run.made >= 60 * depth)
        inputs, classes = next(data)
        return _entropy(model(inputs), classes)

    fit(run, model, optimizer, loss)


def _frozen(run: Run) -> None:
    x, y = centred_images()
    backbone = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone.requires_grad_(False), mlp(512, 32, 10))  # noqa: FBT003
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.003)
    fit(run, model, optimizer, over(batches(32, x, y), lambda x, y: _entropy(model(x), y)))


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)  # noqa: FBT003
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + 2 * x @ self.a.T @ self.b.T


def _lora(optimizer: type[torch.optim.Optimizer], **options: float) -> Any:
    def train(run: Run) -> None:
        x, y = digits()
        base = mlp(64, 96, 96, 10)
        before = torch.optim.Adam(base.parameters(), lr=0.003)
        train_before(before, over(batches(64, x, y), lambda x, y: _entropy(base(x), y)), 150)
        turned = x.reshape(-1, 8, 8).transpose(1, 2).flatten(1)
        model = nn.Sequential(*(_Lora(part, 8) if isinstance(part, nn.Linear) else part for part in base))
        adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made: Any = optimizer  # each takes its own options
        objective = over(batches(64, turned, y), lambda x, y: _entropy(model(x), y))
        fit(run, model, made(adapters, **options), objective)

    return train


class _Heads(nn.Module):
    def __init__(self, trunk: nn.Module, width: int, *outputs: int) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(nn.Linear(width, output) for output in outputs)

    def forward(self, x: Tensor, head: int) -> Any:
        return self.heads[head](self.trunk(x))


def _rare_heads(run: Run) -> None:
    x, y = digits()
    targets = [y, y % 2, y // 5, (y == 8).long()]
    model = _Heads(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 64, 10, 2, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    run.watch(model)
    while True:
        head = 3 if run.made % 40 == 39 else 2 if run.made % 15 == 14 else run.made % 2
        optimizer.zero_grad(set_to_none=False)
        chosen = torch.randint(len(x), (64,))
        loss = _entropy(model(x[chosen], head), targets[head][chosen])
        loss.backward()
        optimizer.step()
        run.step(loss)


def _alternating(run: Run) -> None:
    x, y = digits()
    ink = 150 * (x.mean(1, keepdim=True) - x.mean())
    model = _Heads(mlp(64, 64, 64), 64, 10, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    data = batches(64, x, y, ink)

    def loss() -> Tensor:
        inputs, classes, amount = next(data)
        if run.made % 2:
            return _entropy(model(inputs, 0), classes)
        return _square(model(inputs, 1), amount)

    fit(run, model, optimizer, loss)


def _new_aim(run: Run) -> None:
    x, y = digits()
    model = _Heads(mlp(64, 64, 32), 32, 10, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    data = batches(64, x, y)

    def loss() -> Tensor:
        inputs, classes = next(data)
        wrong = _entropy(model(inputs, 0), classes)
        return wrong if run.made < 150 else wrong + 10 * _square(model(inputs, 1), inputs)

    fit(run, model, optimizer, loss)


PROGRAMS: tuple[Program, ...] = (
    healthy("gradual unfreezing", _unfreezing, "Layers have no gradient until they are unfrozen, one by one."),
    healthy("frozen random backbone", _frozen, "Four of eight tensors never have a gradient nor move."),
    healthy(
        "low-rank adapters, SGD", _lora(torch.optim.SGD, lr=0.02), "B starts at zero, so A has no gradient at step 0."
    ),
    healthy(
        "low-rank adapters, Adam",
        _lora(torch.optim.Adam, lr=0.005),
        "B starts at zero, so its first steps are huge beside it.",
    ),
    healthy("heads used now and then", _rare_heads, "Heads have gradients that are exactly zero in most steps."),
    healthy(
        "two tasks by turns", _alternating, "Every other step has a loss many times as large, and other heads.", 400
    ),
    healthy(
        "an aim added midway", _new_aim, "At step 150 another loss is added and a head wakes that had no gradient."
    ),
)
