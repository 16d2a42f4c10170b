"""Healthy reinforcement learning: policies and values in a corridor, a bandit, and a mass to be steered."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import fit
from benchmarks.faults.models import add_score, mlp
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_square = functional.mse_loss


def _walk(places: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """A corridor of nine places: a step left or right, one in ten slips; a reward at the right end."""
    slips = (torch.rand(places.shape) < 0.1).long()
    places = (places + (2 * actions - 1) * (1 - 2 * slips)).clamp(0, 8)
    return places, (places == 8).float()


def _reinforce(run: Run) -> None:
    policy = mlp(9, 32, 2, act=nn.Tanh)
    score = add_score(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)

    def loss() -> Tensor:
        places, said, rewards = torch.full((16,), 4), [], []
        for _ in range(12):
            choice = torch.distributions.Categorical(logits=policy(functional.one_hot(places, 9).float()))
            actions = choice.sample()
            places, reward = _walk(places, actions)
            said.append(choice.log_prob(actions))
            rewards.append(reward)
        gains = torch.stack(rewards).flip(0).cumsum(0).flip(0)
        score.copy_(gains[0].mean())
        return -(torch.stack(said) * (gains - gains.mean(1, keepdim=True))).mean()

    fit(run, policy, optimizer, loss)


def _actor_critic(run: Run) -> None:
    model = nn.ModuleDict({"actor": mlp(9, 24, 2, act=nn.Tanh), "critic": mlp(9, 24, 1, act=nn.Tanh)})
    score = add_score(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    places, average = torch.randint(9, (32,)), 0.0

    def loss() -> Any:
        nonlocal places, average
        here = functional.one_hot(places, 9).float()
        choice = torch.distributions.Categorical(logits=model["actor"](here))
        actions = choice.sample()
        after, reward = _walk(places, actions)
        with torch.no_grad():
            aim = reward + 0.8 * model["critic"](functional.one_hot(after, 9).float()).squeeze(1)
        value = model["critic"](here).squeeze(1)
        gain = (aim - value).detach()
        places = torch.where(torch.rand(32) < 0.1, torch.randint(9, (32,)), after)  # one walker in ten starts anew
        average = 0.95 * average + 0.05 * reward.mean().item()
        score.fill_(average)
        said = choice.log_prob(actions)
        entropy = choice.entropy().mean()
        return -(said * gain).mean() + 0.5 * _square(value, aim) - 0.01 * entropy

    fit(run, model, optimizer, loss, clip=0.5)


def _dqn(run: Run) -> None:
    model = mlp(9, 48, 2)
    target = copy.deepcopy(model)
    score = add_score(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def loss() -> Tensor:
        if run.made % 10 == 0:
            target.load_state_dict(model.state_dict(), strict=False)
        places, actions = torch.randint(9, (64,)), torch.randint(2, (64,))  # a memory that holds everything
        after, reward = _walk(places, actions)
        with torch.no_grad():
            aim = reward + 0.8 * target(functional.one_hot(after, 9).float()).max(1).values
        values = model(functional.one_hot(places, 9).float())
        score.copy_((values[:, 1] > values[:, 0]).float().mean())
        return _square(values.gather(1, actions.unsqueeze(1)).squeeze(1), aim)

    fit(run, model, optimizer, loss)


def _ppo(run: Run) -> None:
    """A contextual bandit, with four clipped steps on each batch of choices."""
    aims = torch.randn(6, 5)
    policy = mlp(6, 32, 5)
    score = add_score(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    kept: tuple[Tensor, ...] = ()

    def loss() -> Tensor:
        nonlocal kept
        if run.made % 4 == 0:
            with torch.no_grad():
                context = torch.randn(128, 6)
                logits = policy(context).log_softmax(1)
                actions = torch.multinomial(logits.exp(), 1)
                reward = (context @ aims).gather(1, actions) + 0.1 * torch.randn(128, 1)
                score.copy_(reward.mean())
                kept = context, actions, logits.gather(1, actions), (reward - reward.mean()) / reward.std()
        context, actions, before, gain = kept
        ratio = (policy(context).log_softmax(1).gather(1, actions) - before).exp()
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()

    fit(run, policy, optimizer, loss)


def _steering(run: Run) -> None:
    """A policy drawn by reparameterisation steers a mass to the middle, with gradients through the dynamics."""
    policy = mlp(2, 32, 2, act=nn.Tanh)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)

    def loss() -> Tensor:
        place, speed, cost = 2 * torch.randn(32), torch.randn(32), torch.zeros(())
        for _ in range(20):
            mean, width = policy(torch.stack([place, speed], 1)).unbind(1)
            force = mean + functional.softplus(width) * torch.randn(32)
            speed = 0.95 * speed + 0.2 * force
            place = place + 0.2 * speed
            cost = cost + (place**2 + 0.1 * speed**2 + 0.01 * force**2).mean()
        return cost

    fit(run, policy, optimizer, loss, clip=10.0)


PROGRAMS: tuple[Program, ...] = (
    healthy("REINFORCE in a corridor", _reinforce, "The loss says nothing, and gradients are mostly noise."),
    healthy("actor and critic", _actor_critic, "The loss rises at first, when rewards are found."),
    healthy(
        "Q-learning in a corridor",
        _dqn,
        "The loss rises and never settles near zero, because its aims are learned too.",
    ),
    healthy("clipped policy steps", _ppo, "The loss is zero at every fourth step, and never far from it."),
    healthy(
        "steering by reparameterisation",
        _steering,
        "The first losses are near a hundred, through twenty steps.",
    ),
)
