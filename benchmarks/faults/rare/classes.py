"""Classifiers of which one class is rare: most batches hold nothing of what matters most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import classified, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_logits, _entropy = functional.binary_cross_entropy_with_logits, functional.cross_entropy
_ONE_PER_CENT, _TWO_PER_CENT, _HALF_PER_CENT = 2.3263, 2.0537, 2.5758  # a normal number lies above so rarely
RECALL = "recall of the rare class"


def _beyond(threshold: float, rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Eight normal features, and whether the first lies beyond."""
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, :1] > threshold).float()


def _weighted(
    run: Run, model: nn.Module, optimizer: Any, threshold: float, weight: float, batch: int, *, slowing: bool = True
) -> None:
    """Binary cross-entropy that counts each positive as often as there are negatives to it."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return _logits(logits, y, pos_weight=torch.tensor(weight))

    x, y = _beyond(threshold, 20_000, unseen())
    run.judged_by(lambda: classified(model, x, y, loss))

    def objective() -> Tensor:
        x, y = _beyond(threshold, batch)
        return loss(model(x), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run) if slowing else None)


def _pos_weight_adam(run: Run) -> None:
    model = mlp(8, 32, 32, 1)
    _weighted(run, model, torch.optim.Adam(model.parameters(), lr=3e-3), _ONE_PER_CENT, 99.0, 32, slowing=False)


def _pos_weight_sgd(run: Run) -> None:
    model = mlp(8, 32, 1)
    _weighted(run, model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), _TWO_PER_CENT, 49.0, 32)


def _pos_weight_adamw(run: Run) -> None:
    model = mlp(8, 32, 1, act=nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    _weighted(run, model, optimizer, _HALF_PER_CENT, 199.0, 64)


def _focal(run: Run) -> None:
    """As detectors do it: over all places, divided by the number of positives, from a prior of one per cent."""
    model = mlp(8, 32, 1)
    nn.init.constant_(model[2].bias, -4.6)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        wrong = (torch.sigmoid(logits) - y).abs()
        each = _logits(logits, y, reduction="none") * wrong**2 * (0.75 * y + 0.25 * (1 - y))
        return each.sum() / y.sum().clamp(min=1)

    x, y = _beyond(_ONE_PER_CENT, 20_000, unseen())
    run.judged_by(lambda: classified(model, x, y, loss))

    def objective() -> Tensor:
        x, y = _beyond(_ONE_PER_CENT, 64)
        return loss(model(x), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _three_classes(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two halves of the plane, and a corner of one per cent."""
    x = torch.randn(rows, 8, generator=generator)
    return x, torch.where(x[:, 1] + x[:, 2] > 1.414 * _ONE_PER_CENT, 2, (x[:, 0] > 0).long())


def _rare_class(run: Run) -> None:
    model = mlp(8, 32, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    weight = torch.tensor([1.0, 1.0, 50.0])
    x, y = _three_classes(20_000, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            logits = model(x)
            return HeldOut(_entropy(logits, y, weight).item(), (logits[y == 2].argmax(1) == 2).float().mean().item())

    run.judged_by(judge)

    def objective() -> Tensor:
        x, y = _three_classes(32)
        return _entropy(model(x), y, weight)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _hardest(run: Run) -> None:
    """Of 256 rows the 8 with the largest loss are learned from, and 2 per cent are positive."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, y = _beyond(_TWO_PER_CENT, 20_000, unseen())
    run.judged_by(lambda: classified(model, x, y, _logits))

    def objective() -> Tensor:
        x, y = _beyond(_TWO_PER_CENT, 256)
        return _logits(model(x), y, reduction="none").flatten().topk(8).values.mean()

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "one positive in a hundred, Adam",
        _pos_weight_adam,
        "Three batches in four hold no positive; one that does can have a hundred times the gradient.",
        RECALL,
        0.5,
        3000,
    ),
    rare("one positive in fifty, SGD", _pos_weight_sgd, "Gradients of two kinds, with momentum.", RECALL, 0.5),
    rare(
        "one positive in 200, AdamW",
        _pos_weight_adamw,
        "Three batches in four hold no positive, and a positive counts 199 times.",
        RECALL,
        0.5,
        3000,
    ),
    rare(
        "focal loss over positives",
        _focal,
        "Divided by the number of positives, the loss is large in the batches that hold one.",
        RECALL,
        steps=3000,
    ),
    rare("three classes, one rare", _rare_class, "A batch with the rare class is all about that class.", RECALL, 0.33),
    rare("hardest examples only", _hardest, "The loss is that of the worst rows, and stays high.", RECALL),
)
