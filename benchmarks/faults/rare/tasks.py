"""Tasks that change: other scales, other classes, another head, a penalty now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import correct, explained, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss


def _growing_tasks(run: Run) -> None:
    """Four tasks one after another, each on targets three times as large."""
    model = mlp(8, 48, 1, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ways = torch.randn(4, 8, 1, generator=unseen()) / 8**0.5
    x = torch.randn(2000, 8, generator=unseen())

    def aim(x: Tensor, task: int) -> Tensor:
        return 3.0**task * torch.sin(x @ ways[task])

    def judge() -> HeldOut:
        with torch.no_grad():
            out, y = model(x), aim(x, 3)
        return HeldOut(_square(out, y).item(), explained(out, y))

    run.judged_by(judge)

    def objective() -> Tensor:
        x = torch.randn(32, 8)
        return _square(model(x), aim(x, min(3, 4 * run.made // run.steps)))

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _more_classes(run: Run) -> None:
    """Two classes first, and two more every quarter of the run; the new ones make one row in four."""
    centres = 1.5 * torch.randn(8, 8, generator=unseen())
    model = mlp(8, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def rows(classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return centres[classes] + torch.randn(len(classes), 8, generator=generator)

    last = 6 + torch.arange(2000) % 2
    x = rows(last, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(x), last)

    run.judged_by(judge)

    def objective() -> Tensor:
        known = 2 + 2 * min(3, 4 * run.made // run.steps)
        y = torch.randint(known, (32,))
        return _entropy(model(rows(y)), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _new_head(run: Run) -> None:
    """After 300 steps of regression a new head, a new loss and a new optimizer."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    unseen_rows = torch.randn(2000, 8, generator=unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model(unseen_rows), unseen_rows[:, :4].argmax(1))

    run.watch(model)
    while True:
        if run.made == 300:
            model[4] = nn.Linear(32, 4)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            run.judged_by(judge)
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        loss = _square(model(x), x[:, :1]) if run.made < 300 else _entropy(model(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        run.step(loss)


def _lazy_penalty(run: Run) -> None:
    """A penalty on the slope, taken every 16 steps and counted 16 times, as image generators do it."""
    model = mlp(8, 32, 32, 1, act=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    unseen_rows = torch.randn(2000, 8, generator=unseen())

    def penalty(x: Tensor) -> Any:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return 0.02 * (slope**2).sum(1).mean()

    def aim(x: Tensor) -> Tensor:
        return torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] ** 2

    def judge() -> HeldOut:
        x = unseen_rows.clone()
        bad = penalty(x).item()
        with torch.no_grad():
            out = model(x)
        return HeldOut(_square(out, aim(x)).item() + bad, explained(out, aim(x)))

    run.judged_by(judge)

    def objective() -> Any:
        x = torch.randn(32, 8)
        loss = _square(model(x), aim(x))
        return loss + 16 * penalty(x) if run.made % 16 == 0 else loss

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "tasks of growing scale",
        _growing_tasks,
        "Three times the loss jumps to another scale, and comes down.",
        "variance of the last task that is explained",
    ),
    rare(
        "classes added in turn",
        _more_classes,
        "Three times the loss jumps from almost nothing, and comes down.",
        "accuracy on the last classes",
    ),
    rare(
        "a new head and a new loss",
        _new_head,
        "At step 300 the loss is another one, at a hundred times the level, and one layer is new.",
        "accuracy of the new head",
        0.25,
        1500,
    ),
    rare(
        "a penalty every 16 steps",
        _lazy_penalty,
        "Every sixteenth loss is many times the others, and its gradient asks for something else.",
        "variance explained",
    ),
)
