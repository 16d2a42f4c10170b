"""Faults of games: a GAN, bootstrapped values and a policy."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn

from benchmarks.faults.data import digits
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


def gan(run: Run, *, faulty: bool) -> None:
    """A GAN of digits; the loss is the generator's."""
    data = 2 * digits()[0] - 1
    generator, discriminator = (mlp(*widths, act=nn.LeakyReLU) for widths in ((8, 48, 64), (64, 48, 1)))
    model = nn.ModuleDict({"generator": nn.Sequential(generator, nn.Tanh()), "discriminator": discriminator})
    weights = list(generator.parameters())
    for_generator = torch.optim.Adam(weights, 2e-4, betas=(0.5, 0.999))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), 0.03 if faulty else 2e-4, betas=(0.5, 0.999))
    run.watch(model)
    while True:
        model.zero_grad()
        real = data[torch.randint(len(data), (64,))]
        made = model["generator"](torch.randn(64, 8))
        (F.softplus(-discriminator(real)) + F.softplus(discriminator(made.detach()))).mean().backward()
        for_discriminator.step()
        loss = F.softplus(-discriminator(made)).mean()
        loss.backward(inputs=weights)  # the discriminator's gradient stays its own
        for_generator.step()
        run.step(loss)


def bootstrapped(run: Run, *, faulty: bool) -> None:
    """Baird's star: values of seven states that share features, learned off policy from their own estimates."""
    stars = torch.zeros(7, 8)
    stars[:6, :6], stars[:6, 7] = 2 * torch.eye(6), 1.0
    stars[6, 6], stars[6, 7] = 1.0, 2.0
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    nn.init.eye_(model.get_parameter("0.weight"))
    target = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    run.watch(model)
    while True:
        if run.made % 50 == 0:
            target.load_state_dict(model.state_dict())
        with torch.no_grad():  # all states lead to the last one, without a reward
            ahead = 0.99 * (model if faulty else target)(stars[6]).expand(64)
        optimizer.zero_grad()
        loss = F.mse_loss(model(stars[torch.randint(7, (64,))])[:, 0], ahead)
        loss.backward()
        optimizer.step()
        run.step(loss)


def policy(run: Run, *, faulty: bool) -> None:
    """REINFORCE on a choice of one in eight that depends on what is seen; what is reported is the mean cost."""
    rule = mlp(6, 16, 8, act=nn.Tanh)
    model = mlp(6, 32, 32, 8, act=nn.Tanh)
    optimizer = torch.optim.RMSprop(model.parameters(), 10.0 if faulty else 5e-3)
    run.watch(model)
    while True:
        seen = torch.randn(128, 6)
        odds = torch.distributions.Categorical(logits=model(seen))
        choice = odds.sample()
        best = (5 * rule(seen)).argmax(1)
        cost = (choice != best).float()
        optimizer.zero_grad()
        ((cost - cost.mean()) * odds.log_prob(choice)).mean().backward()
        optimizer.step()
        run.step(cost.mean())


PROGRAMS: tuple[Program, ...] = (
    Program(
        "discriminator's rate too high",
        "adversarial and reinforcement",
        partial(gan, faulty=True),
        partial(gan, faulty=False),
        "The discriminator wins at once and the generator's loss blows up; a lower rate for it repairs it.",
        symptoms=("exploding", "diverging"),
        suspect="discriminator.",
    ),
    Program(
        "values learned from themselves",
        "adversarial and reinforcement",
        partial(bootstrapped, faulty=True),
        partial(bootstrapped, faulty=False),
        "Values chase their own estimates and grow without end; a target net repairs it.",
        symptoms=("exploding", "diverging", "nonfinite"),
    ),
    Program(
        "policy gradient at a rate of 10",
        "adversarial and reinforcement",
        partial(policy, faulty=True),
        partial(policy, faulty=False),
        "The policy collapses onto one choice and gets no more gradient; a lower rate repairs it.",
        symptoms=("stalled", "vanishing", "dead"),
    ),
)
