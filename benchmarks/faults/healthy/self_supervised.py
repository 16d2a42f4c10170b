"""Healthy trainings without labels, or with the answers of another model for labels."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.data import digits
from benchmarks.faults.loops import batches, fit, over, train_before
from benchmarks.faults.models import add_score, mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_entropy, _square = functional.cross_entropy, functional.mse_loss
_logits = functional.binary_cross_entropy_with_logits


def _triplet(run: Run) -> None:
    x, y = digits()
    model = mlp(64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    by_class = [x[y == which] for which in range(10)]

    def code(rows: Tensor) -> Tensor:
        return functional.normalize(model(rows[torch.randint(len(rows), (24,))]), dim=1)

    def loss() -> Tensor:
        which = torch.randperm(10)
        mine, other = by_class[int(which[0])], by_class[int(which[1])]
        return functional.triplet_margin_loss(code(mine), code(mine), code(other), margin=0.3)

    fit(run, model, optimizer, loss)


def _contrastive(run: Run) -> None:
    x, _ = digits()
    model = mlp(64, 96, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    def loss(x: Tensor) -> Tensor:
        one, two = (functional.normalize(model(x + 0.15 * torch.randn_like(x)), dim=1) for _ in range(2))
        return _entropy(one @ two.T / 0.1, torch.arange(len(x)))

    fit(run, model, optimizer, over(batches(64, x), loss))


def _information(run: Run) -> None:
    """A bound on mutual information, made as large as can be: the loss is minus that bound."""
    critic = mlp(4, 48, 1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.003)

    def loss() -> Any:
        x = torch.randn(128, 2)
        y = x + 0.5 * torch.randn(128, 2)
        joint, apart = critic(torch.cat([x, y], 1)), critic(torch.cat([x, y.roll(1, 0)], 1))
        return -(joint.mean() - torch.logsumexp(apart, 0).squeeze() + math.log(128))

    fit(run, critic, optimizer, loss)


def _teacher(run: Run) -> None:
    """Few labels; the rest must agree with a teacher that is the student's running mean."""
    x, y = digits()
    student = mlp(64, 64, 10)
    teacher = copy.deepcopy(student).requires_grad_(False)  # noqa: FBT003
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.Adam(student.parameters(), lr=0.003)
    labelled, rest = batches(32, x[:200], y[:200]), batches(64, x)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        (some, classes), (others,) = next(labelled), next(rest)
        aim = teacher(others).softmax(1)
        agree = _square(student(others + 0.1 * torch.randn_like(others)).softmax(1), aim)
        loss = _entropy(student(some), classes) + 5 * min(1.0, run.made / 100) * agree
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
        run.step(loss)


def _distilled(run: Run) -> None:
    x, y = digits()
    teacher, student = mlp(64, 128, 10), mlp(64, 16, 10)
    before = torch.optim.Adam(teacher.parameters(), lr=0.003)
    train_before(before, over(batches(64, x, y), lambda x, y: _entropy(teacher(x), y)), 200)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.005)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            aim = (teacher(x) / 3).log_softmax(1)
        said = (student(x) / 3).log_softmax(1)
        return 9 * functional.kl_div(said, aim, log_target=True, reduction="batchmean")

    fit(run, student, optimizer, over(batches(64, x), loss))


def _self_made(run: Run) -> None:
    """Predicting one's own slow copy, without negatives: the loss is minus a cosine."""
    x, _ = digits()
    online, ahead = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32)), mlp(32, 32, 32)
    slow = copy.deepcopy(online).requires_grad_(False)  # noqa: FBT003
    model = nn.ModuleDict({"online": online, "ahead": ahead})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    score = add_score(model)

    def loss(x: Tensor) -> Tensor:
        one, two = x + 0.2 * torch.randn_like(x), x + 0.2 * torch.randn_like(x)
        with torch.no_grad():
            aim = slow(two)
            for old, new in zip(slow.parameters(), online.parameters(), strict=True):
                old.lerp_(new, 0.02)
        code = online(one)
        score.copy_(functional.normalize(code.detach(), dim=1).std(0).mean())  # 0 would be a collapse
        return -functional.cosine_similarity(ahead(code), aim).mean()

    fit(run, model, optimizer, over(batches(64, x), loss))


def _turned(run: Run) -> None:
    """A classifier, and a judge whose gradients are turned round before the trunk."""
    x, y = digits()
    trunk, classes, judge = mlp(64, 64, 32), nn.Linear(32, 10), mlp(32, 32, 1)
    model = nn.ModuleDict({"trunk": trunk, "classes": classes, "judge": judge})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        brighter = torch.rand(len(x), 1).round()
        seen = torch.relu(trunk(x * (1 + 0.5 * brighter)))
        turned = 1.3 * seen.detach() - 0.3 * seen  # the value of seen, and -0.3 times its gradient
        return _entropy(classes(seen), y) + _logits(judge(turned), brighter)

    fit(run, model, optimizer, over(batches(64, x, y), loss))


PROGRAMS: tuple[Program, ...] = (
    healthy("triplets", _triplet, "Once all triplets are apart, loss and gradients are exactly zero in many steps."),
    healthy("contrast within the batch", _contrastive, "Small gradients through a normalised code."),
    healthy("bound on information", _information, "The loss is negative, falls, and is noisy."),
    healthy(
        "agreeing with a slow teacher",
        _teacher,
        "A weight in the loss climbs, and half of the tensors never have a gradient.",
    ),
    healthy("distilled", _distilled, "The loss falls to almost nothing, gradients with it."),
    healthy(
        "predicting a slow copy",
        _self_made,
        "The loss goes to -1 and gradients to nothing, and yet it has not collapsed.",
    ),
    healthy("turned gradients", _turned, "One part works against another, so one loss does not fall."),
)
