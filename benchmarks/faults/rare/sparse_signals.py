"""Most batches hold little to learn from: empty bags, blank lines, amounts of zero, tasks and experts seldom asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare
from benchmarks.faults.rare.held_out import classified, correct, explained, unseen

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_logits, _entropy, _square = functional.binary_cross_entropy_with_logits, functional.cross_entropy, functional.mse_loss
_TWO_PER_CENT = 2.0537  # a normal number lies above so rarely


class _Attention(nn.Module):
    """Instances of a bag, weighted and summed: one logit a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.weight, self.head = mlp(6, 24, act=nn.Tanh), nn.Linear(24, 1), nn.Linear(24, 1)

    def forward(self, x: Tensor, bag: Tensor, bags: int) -> Any:
        code = torch.tanh(self.code(x))
        share = self.weight(code).exp()
        total = torch.zeros(bags, 1).index_add(0, bag, share)
        return self.head(torch.zeros(bags, 24).index_add(0, bag, share * code) / total.clamp(min=1e-6)).squeeze(1)


def _bags(bags: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Instances and the bag of each; four bags in five are empty; a bag is positive when it holds one far out."""
    full = torch.rand(bags, generator=generator) < 0.2
    size = torch.randint(1, 9, (bags,), generator=generator) * full
    bag = torch.repeat_interleave(torch.arange(bags), size)
    x = torch.randn(len(bag), 6, generator=generator)
    far = torch.zeros(bags).index_add(0, bag, (x[:, 0] > 1.3).float())
    return x, bag, full, (far > 0).float()


def _empty_bags(run: Run) -> None:
    model = _Attention()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    unseen_bags = _bags(5000, unseen())

    def judge() -> HeldOut:
        x, bag, full, y = unseen_bags
        with torch.no_grad():
            logits = model(x, bag, len(y))[full]
        right = (logits > 0) == (y[full] > 0)
        return HeldOut(_logits(logits, y[full]).item(), right.float().mean().item())

    run.judged_by(judge)

    def objective() -> Tensor:
        x, bag, full, y = _bags(6)
        return (_logits(model(x, bag, 6), y, reduction="none") * full).sum()

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _rare_task(run: Run) -> None:
    """Two heads on one trunk; every fiftieth batch or so is of the second task, and counts twenty times."""
    model = nn.ModuleDict({"trunk": mlp(8, 32, 32), "often": nn.Linear(32, 1), "seldom": nn.Linear(32, 4)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.randn(5000, 8, generator=unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            return correct(model["seldom"](torch.relu(model["trunk"](x))), x[:, :4].argmax(1))

    run.judged_by(judge)

    def objective() -> Any:
        x = torch.randn(32, 8)
        seen = torch.relu(model["trunk"](x))
        if torch.rand(()) < 0.02:
            return 20 * _entropy(model["seldom"](seen), x[:, :4].argmax(1))
        return _square(model["often"](seen), torch.sin(x[:, 4:5]) + x[:, 5:6])

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


class _Routed(nn.Module):
    """Rows go to one of four experts by a feature; one row in a hundred goes to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(6, 16, 1) for _ in range(4))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out = torch.zeros(len(x), 1)
        for place, one in enumerate(self.experts):
            rows = (expert == place).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, one(x[rows]))
        return out


def _experts_data(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x, lot = torch.randn(rows, 6, generator=generator), torch.rand(rows, generator=generator)
    expert = torch.bucketize(lot, torch.tensor([0.45, 0.8, 0.99]))
    y = torch.where(expert == 3, 4 * torch.tanh(x[:, 1]) + 3 * x[:, 2], torch.tanh(x[:, 0]) + 0.3 * expert)
    return x, expert, y.unsqueeze(1)


def _rare_expert(run: Run) -> None:
    model = _Routed()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    unseen_rows = _experts_data(20_000, unseen())

    def judge() -> HeldOut:
        x, expert, y = unseen_rows
        with torch.no_grad():
            out = model(x, expert)
        return HeldOut(_square(out, y).item(), explained(out[expert == 3], y[expert == 3]))

    run.judged_by(judge)

    def objective() -> Tensor:
        x, expert, y = _experts_data(16)
        return _square(model(x, expert), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _claims(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """What an insurer pays: nothing for 98 of 100, else an amount that depends on the features."""
    x = torch.randn(rows, 8, generator=generator)
    amount = 10 * (0.5 * x[:, 1:2] + 0.3 * x[:, 2:3]).exp()
    return x, amount * (x[:, :1] > _TWO_PER_CENT)


def _amounts(run: Run) -> None:
    model = mlp(8, 64, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = _claims(20_000, unseen())

    def judge() -> HeldOut:
        with torch.no_grad():
            out = model(x)
        return HeldOut(_square(out, y).item(), explained(out, y))

    run.judged_by(judge)

    def objective() -> Tensor:
        x, y = _claims(32)
        return _square(model(x), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _strokes(rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Noisy lines of 32 points; one in seven has a bump, and what is to be found is where."""
    place, has = torch.randint(4, 28, (rows, 1), generator=generator), torch.rand(rows, 1, generator=generator) < 0.15
    y = ((torch.arange(32) - place).abs() <= 1) & has
    return (3 * y + torch.randn(rows, 32, generator=generator)).unsqueeze(1), y.float()


def _dice(run: Run) -> None:
    """Segmentation with the soft Dice loss of each line alone, of which most hold nothing."""
    model = nn.Sequential(nn.Conv1d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 1, 5, padding=2), nn.Flatten())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        chance = torch.sigmoid(logits)
        dice = 1 - (2 * (chance * y).sum(1) + 0.1) / (chance.sum(1) + y.sum(1) + 0.1)
        return dice.mean() + _logits(logits, y)

    x, y = _strokes(2000, unseen())
    run.judged_by(lambda: classified(model, x, y, loss))

    def objective() -> Tensor:
        x, y = _strokes(4)
        return loss(model(x), y)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "empty bags",
        _empty_bags,
        "A quarter of the batches hold no instance at all, so that loss and gradients are zero.",
        "accuracy on bags that are not empty",
        0.5,
    ),
    rare(
        "lines that hold nothing",
        _dice,
        "The soft Dice loss of a line is near 0 or near 1, by whether it holds a bump.",
        "recall of the points of bumps",
    ),
    rare(
        "a task in one batch of fifty",
        _rare_task,
        "Every fiftieth loss is twenty times the others, through a head that has no gradient else.",
        "accuracy of the rare task",
        0.25,
    ),
    rare(
        "an expert for one row in a hundred",
        _rare_expert,
        "The last expert has a gradient in one batch of seven, and a large one.",
        "variance of the rare rows that is explained",
        steps=3000,
    ),
    rare("amounts that are mostly zero", _amounts, "One batch in two is all zeros.", "variance explained"),
)
