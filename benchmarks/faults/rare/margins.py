"""Margins and contrasts: once they are met most batches have no gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import correct, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy = functional.cross_entropy


def _clouds(classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    centres = 1.2 * torch.randn(6, 8, generator=unseen())
    return centres[classes] + 0.5 * torch.randn(len(classes), 8, generator=generator)


def _triplets(run: Run) -> None:
    """Once almost all triplets are apart, most batches of eight have no gradient at all."""
    model = mlp(8, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def three(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.randint(6, (rows,), generator=generator)
        other = (one + torch.randint(1, 6, (rows,), generator=generator)) % 6
        return _clouds(one, generator), _clouds(one, generator), _clouds(other, generator)

    def loss(anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return functional.triplet_margin_loss(model(anchor), model(near), model(far))

    held_out = three(4000, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            anchor, near, far = (model(x) for x in held_out)
            apart = (anchor - far).norm(dim=1) > (anchor - near).norm(dim=1) + 1
            return HeldOut(functional.triplet_margin_loss(anchor, near, far).item(), apart.float().mean().item())

    run.judged_by(judge)
    fit(run, model, optimizer, lambda: loss(*three(8)), schedule=to_zero(optimizer, run))


def _hinge(run: Run) -> None:
    """The hinge loss of classes that a margin parts: near the end a row in hundreds says anything."""
    model = mlp(8, 32, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    y = torch.arange(6000) % 6
    x = _clouds(y, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            logits = model(x)
            own = logits.gather(1, y.unsqueeze(1))
            margin = own.squeeze(1) - logits.scatter(1, y.unsqueeze(1), -torch.inf).max(1).values
            return HeldOut(functional.multi_margin_loss(logits, y).item(), (margin > 1).float().mean().item())

    run.judged_by(judge)

    def objective() -> Tensor:
        y = torch.randint(6, (4,))
        return functional.multi_margin_loss(model(_clouds(y)), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _hard_batches(run: Run) -> None:
    """Each row is to find its own copy; one batch in twenty is of rows that lie close together."""
    model = mlp(12, 32, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def pair(rows: int, width: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Twice the same six features, each time with six others that say nothing."""
        x = width * torch.randn(rows, 6, generator=generator) + torch.randn(1, 6, generator=generator)
        one, two = torch.randn(2, rows, 6, generator=generator)
        return torch.cat([x, one], 1), torch.cat([x, two], 1)

    def alike(one: Tensor, two: Tensor) -> Any:
        return functional.normalize(model(one), dim=-1) @ functional.normalize(model(two), dim=-1).mT / 0.05

    generator, own = unseen(), torch.arange(16)
    close = [torch.stack(parts) for parts in zip(*(pair(16, 0.3, generator) for _ in range(100)), strict=True)]

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(alike(close[0], close[1]).flatten(0, 1), own.repeat(100))

    run.judged_by(judge)

    def objective() -> Tensor:
        return _entropy(alike(*pair(16, 0.3 if torch.rand(()) < 0.05 else 1.5)), own)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "triplets, mostly apart",
        _triplets,
        "In the end nine batches of ten have exactly no gradient, and one has.",
        "share of triplets a margin apart",
    ),
    rare(
        "classes a margin apart",
        _hinge,
        "In the end most batches have exactly no gradient, and some have.",
        "share of rows a margin apart",
    ),
    rare(
        "contrast with hard batches",
        _hard_batches,
        "One batch in twenty is hard: its loss is many times the others'.",
        "accuracy in hard batches",
        1 / 16,
    ),
)
