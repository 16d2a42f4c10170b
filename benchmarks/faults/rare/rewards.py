"""Rewards and values: a reward is seldom found, and what is learned from it jumps."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit, to_zero
from benchmarks.faults.models import mlp
from benchmarks.faults.program import HeldOut, Program, rare

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_square = functional.mse_loss
_LENGTH = 9  # steps from one end to the other
_SIDE, _DISCOUNT = 5, 0.9
BEST = "share of places with the best move"


def _lock(run: Run) -> None:
    """A lock of five digits 0..2: a reward for the whole combination alone, one try in 243, two tries a step."""
    policy = mlp(5, 16, 3, act=nn.Tanh)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    places, combination = torch.eye(5), torch.tensor([2, 0, 1, 1, 2])

    def judge() -> HeldOut:
        with torch.no_grad():
            chance = policy(places).softmax(1).gather(1, combination.unsqueeze(1)).prod().item()
        return HeldOut(1 - chance, chance)

    run.judged_by(judge)

    def objective() -> Any:
        said = policy(places).log_softmax(1)
        tries = torch.multinomial(said.detach().exp(), 2, replacement=True)  # (place, try)
        reward = (tries == combination.unsqueeze(1)).all(0).float()
        return -(said.gather(1, tries).sum(0) * reward).mean()

    fit(run, policy, optimizer, objective)


def _corridor(run: Run) -> None:
    """A corridor of ten places from the left end; its right end alone pays, and that to one walker in ten; SGD."""
    policy = mlp(_LENGTH + 1, 16, 2, act=nn.Tanh)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    here = torch.eye(_LENGTH + 1)

    def judge() -> HeldOut:
        """The chance to arrive, exactly."""
        with torch.no_grad():
            right = policy(here).softmax(1)[:, 1]
        at = here[0]
        for _ in range(14):
            ahead, back = at[:-1] * right[:-1], at[:-1] * (1 - right[:-1])
            moved = torch.zeros(_LENGTH + 1)
            moved[1:] += ahead
            moved[:-2] += back[1:]
            moved[0] += back[0]
            moved[-1] += at[-1]
            at = moved
        return HeldOut(1 - at[-1].item(), at[-1].item())

    run.judged_by(judge)

    def objective() -> Any:
        said = policy(here).log_softmax(1)
        chance, lots = said.detach()[:, 1].exp(), torch.rand(14, 8)
        place, visited, moves = torch.zeros(8, dtype=torch.long), [], []
        for lot in lots:
            right = (lot < chance[place]).long()
            visited.append(place)
            moves.append(right)
            place = torch.where(place == _LENGTH, place, (place + 2 * right - 1).clamp(min=0))
        spoken = said[torch.stack(visited), torch.stack(moves)].sum(0)
        return -(spoken * ((place == _LENGTH) & (torch.rand(8) < 0.1))).mean()

    fit(run, policy, optimizer, objective)


def _grid() -> tuple[Tensor, Tensor, Tensor]:
    """Where each of four moves leads from each of 25 places, what it pays, and what it is worth ``(25, 4)``."""
    place = torch.arange(_SIDE**2)
    row, column = place // _SIDE, place % _SIDE
    moves = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
    rows = (row.unsqueeze(1) + moves[:, 0]).clamp(0, _SIDE - 1)
    columns = (column.unsqueeze(1) + moves[:, 1]).clamp(0, _SIDE - 1)
    after = rows * _SIDE + columns
    reward = 10.0 * (after == _SIDE**2 - 1)
    worth = torch.zeros(_SIDE**2, 4)
    for _ in range(100):
        worth = reward + _DISCOUNT * worth.max(1).values[after] * (after != _SIDE**2 - 1)
    return after, reward, worth


def _judge_values(run: Run, model: nn.Module, worth: Tensor) -> None:
    """The squared error of the values, and the share of places in which the best move is chosen."""
    places = torch.eye(len(worth))[:-1]

    def judge() -> HeldOut:
        with torch.no_grad():
            values = model(places)
        chosen = worth[:-1].gather(1, values.argmax(1, keepdim=True)).squeeze(1)
        best = (chosen >= worth[:-1].max(1).values - 1e-4).float().mean().item()
        return HeldOut(_square(values, worth[:-1]).item(), best)

    run.judged_by(judge)


def _target_network(run: Run) -> None:
    """Q-learning on a grid whose goal alone pays; the target is copied every 200 steps."""
    after, reward, worth = _grid()
    model = mlp(_SIDE**2, 48, 4)
    target, places = copy.deepcopy(model), torch.eye(_SIDE**2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    _judge_values(run, model, worth)

    def objective() -> Tensor:
        if run.made % 200 == 0:
            target.load_state_dict(model.state_dict())
        place, move = torch.randint(_SIDE**2 - 1, (32,)), torch.randint(4, (32,))
        then = after[place, move]
        with torch.no_grad():
            aim = reward[place, move] + _DISCOUNT * target(places[then]).max(1).values * (then != _SIDE**2 - 1)
        return _square(model(places[place]).gather(1, move.unsqueeze(1)).squeeze(1), aim)

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


def _prioritised(run: Run) -> None:
    """Moves are drawn by how wrong their value was, and weighted back; the target is copied every 100 steps."""
    after, reward, worth = _grid()
    after, reward, steps = after.flatten()[:-4], reward.flatten()[:-4], 4 * (_SIDE**2 - 1)
    model = mlp(_SIDE**2, 48, 4)
    target, places = copy.deepcopy(model), torch.eye(_SIDE**2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    priority = torch.ones(steps)
    _judge_values(run, model, worth)

    def objective() -> Tensor:
        if run.made % 100 == 0:
            target.load_state_dict(model.state_dict())
        chance = priority**0.6 / (priority**0.6).sum()
        drawn = torch.multinomial(chance, 16, replacement=True)
        weight = (steps * chance[drawn]) ** -0.4
        then = after[drawn]
        with torch.no_grad():
            aim = reward[drawn] + _DISCOUNT * target(places[then]).max(1).values * (then != _SIDE**2 - 1)
        wrong = model(places[drawn // 4]).gather(1, (drawn % 4).unsqueeze(1)).squeeze(1) - aim
        priority[drawn] = wrong.detach().abs() + 1e-3
        return (weight / weight.max() * functional.smooth_l1_loss(wrong, torch.zeros(16), reduction="none")).mean()

    fit(run, model, optimizer, objective, schedule=to_zero(optimizer, run))


PROGRAMS: tuple[Program, ...] = (
    rare(
        "a lock that pays once in 243",
        _lock,
        "At first 120 steps in 121 have no reward, and no gradient at all.",
        "chance to open the lock",
        steps=3000,
    ),
    rare(
        "a corridor whose end alone pays",
        _corridor,
        "At first 97 steps of 100 have no gradient, and later every second.",
        "chance to arrive",
    ),
    rare(
        "targets copied every 200 steps",
        _target_network,
        "Every copy makes loss and gradients jump, and values grow to ten.",
        BEST,
        0.5,
        3000,
    ),
    rare(
        "replay by priority",
        _prioritised,
        "What is most wrong is drawn most, so that a reward that is found comes in bursts.",
        BEST,
        0.5,
    ),
)
