"""Two optimizers that take turns: adversarial losses need not fall, those of a joint training do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    Turn = Callable[[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer], None]

OPPOSED = "the loss may be one that need not fall: two optimizers take turns"
bce = nn.functional.binary_cross_entropy_with_logits


def net(inputs: int, outputs: int) -> nn.Sequential:
    """A small network."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.LeakyReLU(0.2), nn.Linear(32, outputs))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def adversarial(first: nn.Module, second: nn.Module, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """One turn of a generator and its discriminator."""
    real, fake = torch.randn(32, 2) + 1, first(torch.randn(32, 4))
    step(other, bce(second(real), torch.ones(32, 1)) + bce(second(fake.detach()), torch.zeros(32, 1)))
    step(one, bce(second(first(torch.randn(32, 4))), torch.ones(32, 1)))


def behind(first: nn.Module, second: nn.Module, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """The same, where the generator makes the first step."""
    step(one, bce(second(first(torch.randn(32, 4))), torch.ones(32, 1)))
    real, fake = torch.randn(32, 2) + 1, first(torch.randn(32, 4)).detach()
    step(other, bce(second(real), torch.ones(32, 1)) + bce(second(fake), torch.zeros(32, 1)))


def joint(first: nn.Module, second: nn.Module, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Both are trained by one loss."""
    x = torch.randn(32, 4)
    for optimizer in (one, other):
        optimizer.zero_grad()
    (second(first(x)) - x[:, :1]).square().mean().backward()
    one.step()
    other.step()


def apart(first: nn.Module, second: nn.Module, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Each by a loss of its own, which does not run through the other."""
    x = torch.randn(32, 4)
    step(one, (first(x) - x[:, :2]).square().mean())
    step(other, (second(x[:, :2]) - x[:, :1]).square().mean())


@pytest.mark.parametrize("watched", ["both in one", "the first", "the second"])
@pytest.mark.parametrize(("turn", "opposed"), [(adversarial, True), (joint, False), (apart, False)])
def test_losses_oppose_where_one_runs_through_what_the_other_trains(
    turn: Turn,
    opposed: bool,
    watched: str,
) -> None:
    """Whichever of the models is watched; it is noted once."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"first": net(4, 2), "second": net(2, 1)})
    first, second = both["first"], both["second"]
    one, other = (torch.optim.Adam(part.parameters(), lr=1e-3) for part in (first, second))
    model = {"both in one": both, "the first": first, "the second": second}[watched]
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(40):
            turn(first, second, one, other)
        assert sum(note.startswith(OPPOSED) for note in monitor.notes) == opposed


@pytest.mark.parametrize("shared", ["all of the model", "its head"])
def test_two_optimizers_of_the_same_parameters_do_not_oppose(shared: str) -> None:
    """They train one loss by turns, as some do who change the optimizer back and forth, or train a head twice."""
    torch.manual_seed(0)
    model = net(4, 1)
    one = torch.optim.SGD(model.parameters(), lr=1e-3)
    other = torch.optim.SGD((model if shared == "all of the model" else model[-1]).parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(20):
            for optimizer in (one, other):
                x = torch.randn(32, 4)
                step(optimizer, (model(x) - x[:, :1]).square().mean())
        assert monitor.notes == []


def test_a_pair_of_other_models_says_nothing_about_this_one() -> None:
    """They are trained in the same process."""
    torch.manual_seed(0)
    first, second, mine = net(4, 2), net(2, 1), net(4, 1)
    one, other, own = (torch.optim.Adam(part.parameters(), lr=1e-3) for part in (first, second, mine))
    with gradwatch.attach(mine, report=None, strict=True) as monitor:
        for _ in range(40):
            adversarial(first, second, one, other)
            x = torch.randn(32, 4)
            step(own, (mine(x) - x[:, :1]).square().mean())
        assert not [note for note in monitor.notes if note.startswith(OPPOSED)]


def test_a_healthy_adversarial_training_is_not_called_stalled_or_diverging() -> None:
    """And nobody is told to overfit one batch."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"first": net(4, 2), "second": net(2, 1)})
    one, other = (torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in both.values())
    with gradwatch.attach(both, report=None, strict=True) as monitor:
        for _ in range(400):
            adversarial(both["first"], both["second"], one, other)
        assert not {incident.kind for incident in monitor.incidents} & {"stalled", "diverging"}
        assert monitor.verdict == "healthy"


@pytest.mark.parametrize("ahead", [adversarial, behind])
def test_an_adversarial_phase_after_another_is_no_divergence(ahead: Turn) -> None:
    """Its losses are none of the phase before, whichever of the two makes the first step."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"first": net(4, 2), "second": net(2, 1)})
    first, second = both["first"], both["second"]
    one, other = (torch.optim.Adam(part.parameters(), lr=1e-3) for part in (first, second))
    with gradwatch.attach(both, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(64, 4)
            step(one, nn.functional.mse_loss(first(x), x[:, :2].tanh()))
        for _ in range(100):
            ahead(first, second, one, other)
        assert [incident for incident in monitor.incidents if incident.severity != "notice"] == []
        assert monitor.verdict == "healthy"
