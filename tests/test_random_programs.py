"""Random small training programs: every row is that of its own optimizer step, whatever the program does in between."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import device
from tests.trainings import true_norm

PROGRAMS, TOGETHER = 420, 30
NAMES = ("trunk.0", "trunk.1", "trunk.2", "heads.0", "heads.1")


class Net(nn.Module):
    """A trunk of three residual blocks, any of which may be left out, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))

    def forward(self, x: Tensor, used: frozenset[str]) -> Tensor:
        """Return the mean of the heads in use."""
        for number, block in enumerate(self.trunk):
            if f"trunk.{number}" in used:
                x = x + torch.tanh(block(x))
        heads = [head(x) for number, head in enumerate(self.heads) if f"heads.{number}" in used]
        return torch.stack(heads).mean(0)


@dataclass(frozen=True)
class Style:
    """What stays the same through one program; ``parts`` are the blocks and heads of each optimizer."""

    parts: tuple[tuple[str, ...], ...]
    optimizers: tuple[str, ...]
    steps: int
    by_hand: str
    closures: bool
    to_none: bool
    clears_all: bool
    clip: str
    turns: bool
    depth: bool
    gives_loss: bool
    leaves_out: bool
    freezes: bool
    on_device: bool


def style_of(draw: random.Random) -> Style:
    """Draw what stays the same."""
    names, count = list(NAMES), draw.choice((1, 1, 2, 3))
    draw.shuffle(names)
    cuts = [0, *sorted(draw.sample(range(1, len(names)), count - 1)), len(names)]
    by_hand = draw.choice(("", "", "", "new tensors", "in place"))
    on_device, freezes = draw.random() < 0.25, not by_hand or draw.random() < 0.5
    return Style(
        parts=tuple(tuple(names[a:b]) for a, b in pairwise(cuts)),
        optimizers=tuple(draw.choice(("SGD", "Adam")) for _ in range(count)),
        steps=draw.choice((14, 14, 14, 90)) if count == 1 else 14,
        by_hand=by_hand,
        closures=not by_hand and draw.random() < 0.3,
        to_none=on_device or draw.random() < 0.5,
        clears_all=draw.random() < 0.5,
        clip=draw.choice(("none", "norm", "value")),
        turns=draw.random() < 0.4,
        depth=draw.random() < 0.4,
        gives_loss=bool(by_hand) and freezes,
        leaves_out=not (by_hand and freezes),
        freezes=freezes,
        on_device=on_device,
    )


class Books:
    """What the rows must be, kept by the program itself: it knows what each of its backwards reached and what it clears.

    A step's loss is the sum of the backwards that reached the optimizer's layers since its gradients were cleared or used;
    its norms are those before the first of the user's clips since then.
    """

    def __init__(self, parts: tuple[tuple[str, ...], ...]) -> None:
        self.parts = parts
        self.losses: list[list[float]] = [[] for _ in parts]
        self.whole: list[dict[str, float] | None] = [None for _ in parts]
        self.rows: list[tuple[float, dict[str, float]]] = []

    def reached(self, used: frozenset[str], loss: float) -> None:
        """A backward gave these blocks and heads a gradient."""
        for owner, part in enumerate(self.parts):
            if used & set(part):
                self.losses[owner].append(loss)
                self.whole[owner] = None

    def written(self, owner: int) -> None:
        """An optimizer's gradients were cleared, used or made by hand."""
        self.losses[owner].clear()
        self.whole[owner] = None

    def clipped(self, norms: dict[str, float]) -> None:
        """All gradients are about to be clipped."""
        self.whole = [whole if whole is not None else norms for whole in self.whole]

    def stepped(self, owner: int, norms: dict[str, float], given: float | None) -> None:
        """An optimizer steps; ``norms`` are those of its gradients now."""
        whole = self.whole[owner] or norms
        loss = sum(self.losses[owner]) if self.losses[owner] else math.nan
        own = {name: norm for name, norm in whole.items() if name.rpartition(".")[0] in self.parts[owner]}
        self.rows.append((loss if given is None else given, own))
        self.written(owner)


class Run:
    """One program, run."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.style = style_of(self.draw)
        torch.manual_seed(seed)
        self.net, self.other = Net(), nn.Linear(6, 1)
        self.data = torch.randn(64, 6), torch.randn(64, 1)
        self.optimizers = [
            getattr(torch.optim, name)([p for n in part for p in self.net.get_submodule(n).parameters()], lr=0.01)
            for name, part in zip(self.style.optimizers, self.style.parts, strict=True)
        ]
        self.books = Books(self.style.parts)
        self.known: set[int] = set()
        self.monitor: gradwatch.Monitor | None = None

    def everything(self) -> None:
        """Run the program from its beginning to its end."""
        for number in range(self.style.steps):
            if self.style.freezes and self.draw.random() < 0.15:
                module = self.net.get_submodule(self.draw.choice(NAMES))
                module.requires_grad_(not next(module.parameters()).requires_grad)
            count = len(self.optimizers)
            owners = list(range(count)) if self.draw.random() < 0.5 else [self.draw.randrange(count)]
            if self.style.by_hand:
                self.step_by_hand(number, owners)
            else:
                self.step(number, owners)

    def step(self, number: int, owners: list[int]) -> None:
        """Clear, accumulate, clip, step; sometimes with backwards that do not count, sometimes left out."""
        self.clear(owners)
        if self.draw.random() < 0.15:
            self.backward(number)
            self.clear(owners)
        if self.draw.random() < 0.3:
            (5 * self.other(self.data[0]).square().mean()).backward()
        passes = self.draw.choice((1, 1, 1, 2, 3, 4))
        inside = self.style.closures and self.draw.random() < 0.7
        for _ in range(passes - inside):
            self.backward(number)
        if inside:
            self.step_with_closure(number, owners[0])
            return
        self.clip()
        for owner in owners:
            if self.style.leaves_out and self.draw.random() < 0.1:  # as users do at a loss that is not finite
                continue
            self.books.stepped(owner, self.norms(), None)
            self.optimizers[owner].step()

    def step_with_closure(self, number: int, owner: int) -> None:
        """The last backward runs inside the step, as in Lightning."""

        def closure() -> Tensor:
            before = len(self.books.losses[owner])
            loss = self.backward(number)
            if (
                len(self.books.losses[owner]) == before
            ):  # what a closure returns is its step's loss, whatever it reached
                self.books.losses[owner].append(loss.item())
            self.books.stepped(owner, self.norms(), None)
            return loss

        self.optimizers[owner].step(closure)

    def step_by_hand(self, number: int, owners: list[int]) -> None:
        """Gradients come from `torch.autograd.grad` and are put into place."""
        for owner in owners:
            loss, _ = self.forward(number)
            total = loss + sum(self.forward(number)[0] for _ in range(self.draw.choice((0, 0, 1))))
            parameters = [p for group in self.optimizers[owner].param_groups for p in group["params"]]
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            if not trained:
                continue
            found = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
            gradients = [
                gradient.detach() for gradient in found
            ]  # in torch 2.6, zeros for unused parameters require one
            for parameter, gradient in zip(trained, gradients, strict=True):
                if self.style.by_hand == "in place" and parameter.grad is not None:
                    parameter.grad.copy_(gradient)
                else:
                    parameter.grad = gradient
            self.books.written(owner)
            self.clip()
            # which of several optimizers a gradient made by hand is for is not known before they step
            if self.style.leaves_out and owner in self.known and self.draw.random() < 0.1:
                continue
            self.known.add(owner)
            given = None
            if self.style.gives_loss:
                given = total.item()
                if self.monitor is not None:
                    self.monitor.loss(total)
            self.books.stepped(owner, self.norms(), given)
            self.optimizers[owner].step()

    def forward(self, number: int) -> tuple[Tensor, frozenset[str]]:
        """Return a loss that needs a gradient, and the blocks and heads that it reaches."""
        while True:
            blocks = {f"trunk.{n}" for n in range(3) if not self.style.depth or self.draw.random() < 0.7}
            heads = {f"heads.{number % 2}"} if self.style.turns else {"heads.0", self.draw.choice(NAMES[3:])}
            used = frozenset(blocks | heads)
            rows = [self.draw.randrange(64) for _ in range(8)]
            loss = nn.functional.mse_loss(self.net(self.data[0][rows], used), self.data[1][rows])
            reached = [n for n in used if next(self.net.get_submodule(n).parameters()).requires_grad]
            if reached:
                return loss, frozenset(reached)
            self.net.requires_grad_(requires_grad=True)

    def backward(self, number: int) -> Tensor:
        """Run one backward."""
        loss, reached = self.forward(number)
        loss.backward()
        self.books.reached(reached, loss.item())
        return loss

    def clear(self, owners: list[int]) -> None:
        """Clear the gradients of all, or of those that step."""
        if self.style.clears_all:
            self.net.zero_grad(set_to_none=self.style.to_none)
        for owner in range(len(self.optimizers)) if self.style.clears_all else owners:
            self.optimizers[owner].zero_grad(set_to_none=self.style.to_none)
            self.books.written(owner)

    def clip(self) -> None:
        """The user's own clip, now and then."""
        if self.style.clip == "none" or (not self.style.by_hand and self.draw.random() < 0.2):
            return
        self.books.clipped(self.norms())
        if self.style.clip == "norm":
            nn.utils.clip_grad_norm_(self.net.parameters(), self.draw.choice((0.05, 1e3)))
        else:
            nn.utils.clip_grad_value_(self.net.parameters(), self.draw.choice((0.01, 1e3)))

    def norms(self) -> dict[str, float]:
        """Return the norm of each gradient, by a loop in float64."""
        return {name: true_norm(parameter.grad) for name, parameter in self.net.named_parameters()}


def check(seed: int, patch: pytest.MonkeyPatch) -> int:
    """Run a program watched and, where it is short, unwatched; return how many rows were right."""
    run = Run(seed)
    if run.style.on_device:
        patch.setattr(device, "reading_is_free", lambda _: False)
    run.monitor = gradwatch.attach(run.net, report=None, strict=True)
    run.everything()
    run.monitor.detach()
    patch.undo()
    history, rows = run.monitor.history, run.books.rows
    told = f"program {seed}: {run.style}"
    assert not [note for note in run.monitor.notes if "switched off" in note], told
    assert history.rows == len(rows), told
    norms = [[own.get(name, math.nan) for name in history.layers] for _, own in rows]
    np.testing.assert_allclose(history.loss(), [loss for loss, _ in rows], rtol=1e-5, atol=1e-30, err_msg=told)
    if rows:
        np.testing.assert_allclose(history.grad_norm(), norms, rtol=1e-5, atol=1e-18, err_msg=told)
    if run.style.steps < 20:
        plain = Run(seed)
        plain.everything()
        assert all(map(torch.equal, plain.net.parameters(), run.net.parameters())), told
    return len(rows)


@pytest.mark.parametrize("first", range(0, PROGRAMS, TOGETHER))
def test_every_row_of_a_random_program_is_that_of_its_own_step(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and norms of each layer before the user's clip, in 420 programs; and watching changes none of them."""
    assert sum(check(seed, monkeypatch) for seed in range(first, first + TOGETHER)) > 10 * TOGETHER
