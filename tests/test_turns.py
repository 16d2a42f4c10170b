"""Two optimizers that take turns: adversarial losses need not fall, those of a joint training do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
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


def saturating(turns: int, *, after: int = 0, resumed: int | None = None, third: bool = False) -> gradwatch.Monitor:
    """A generator under log(1 - D) whose discriminator wins, then ``after`` steps of the discriminator alone."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model = nn.ModuleDict({"G": generator, "D": discriminator, "C": nn.Linear(2, 1)})
    slow, fast = (
        torch.optim.Adam(generator.parameters(), lr=2e-4),
        torch.optim.Adam(discriminator.parameters(), lr=1e-2),
    )
    aside = torch.optim.SGD(model["C"].parameters(), lr=0.003)
    monitor = gradwatch.attach(model, report=None, strict=True)
    for turn in range(turns + after):
        if turn == resumed:
            state = monitor.state_dict()
            monitor.detach()
            monitor = gradwatch.attach(model, report=None, strict=True)
            monitor.load_state_dict(state)
        x = torch.randn(64, 2) / 10 + 3
        if third:
            step(aside, model["C"](x).square().mean())
        fake = generator(torch.randn(64, 8)).detach()
        step(fast, bce(discriminator(x), torch.ones(64, 1)) + bce(discriminator(fake), torch.zeros(64, 1)))
        if turn < turns:
            step(slow, -bce(discriminator(generator(torch.randn(64, 8))), torch.zeros(64, 1)))
    monitor.detach()
    return monitor


def won(monitor: gradwatch.Monitor) -> list[gradwatch.Incident]:
    """Return the incidents in which an opponent has won."""
    return [one for one in monitor.incidents if any(sign.code == "GW407" for sign in one.signs)]


def test_who_has_lost_has_not_recovered_by_making_no_steps() -> None:
    """No gradient has come back."""
    (incident,) = won(saturating(250, after=200))
    assert incident.open


def test_a_resumed_run_knows_that_an_opponent_has_won() -> None:
    """Layers that have made no step since have no loss of which their gradients were largest."""
    assert won(saturating(250, resumed=10))


@pytest.mark.parametrize("third", [False, True])
def test_the_rate_of_the_winner_is_named_only_if_it_is_known_who_it_is(third: bool) -> None:
    """A third optimizer may have nothing to do with it."""
    (incident,) = won(saturating(250, third=third))
    assert ("(0.01 when this began)" in incident.advice[1]) is not third
    assert "0.003" not in incident.advice[1]


def test_an_actor_whose_best_action_is_at_a_bound_has_not_lost() -> None:
    """Its gradient vanishes as its tanh saturates, and its loss rises with the costs that its critic learns of."""
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh())
    critic = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    one, other = torch.optim.Adam(actor.parameters(), lr=3e-2), torch.optim.Adam(critic.parameters(), lr=1e-2)
    model = nn.ModuleDict({"A": actor, "C": critic})
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for turn in range(500):
            state = torch.randn(64, 3)
            action = actor(state).detach() + torch.randn(64, 1) / 10
            cost = 10 + turn / 10 - 5 * action
            step(other, nn.functional.mse_loss(critic(torch.cat([state, action], 1)), cost))
            step(one, critic(torch.cat([state, actor(state)], 1)).mean())
        history = monitor.history
        norms = history.grad_norm()[-100:, 0]
        assert np.nanmax(norms) < history.largest_typical[0][0] / 300
        assert not won(monitor)


def unequal(*, clip: str | None = None, large: int = -1, silent: int = 500) -> gradwatch.Monitor:
    """Train two models by turns, of losses about 400 and 0.1.

    Batch ``large`` of the second is 60 times as large, and from step ``silent`` on every gradient is zero.
    """
    torch.manual_seed(0)
    models = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(2))
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(models, (1e-4, 0.05), strict=True)
    ]
    with gradwatch.attach(models, report=None, clip=clip, strict=True) as monitor:
        for step in range(500):
            for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                x = torch.randn(64, 8) * (60 if number and step == large else 1)
                target = torch.tanh(x[:, :1]) + (1 - number) * 20 * torch.randn(64, 1)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), target)
                (loss if step < silent else loss.detach() + 0 * loss).backward()
                optimizer.step()
    return monitor


def test_losses_of_several_optimizers_have_no_level_together() -> None:
    """The rules that expect a loss to fall rest, and say so; "stalled" was said of the median of both."""
    monitor = unequal()
    assert monitor.incidents == []
    assert any("there is no one loss that must fall: several optimizers take turns" in note for note in monitor.notes)
    assert monitor.snapshot().ending == ""


def test_what_an_incident_has_left_is_compared_with_the_losses_of_its_optimizer() -> None:
    """Not with a median of both, which was 200."""
    (incident,) = [one for one in unequal(clip="norm", large=200).incidents if one.severity != "notice"]
    assert incident.clip is not None
    assert incident.clip.damage.startswith("at step 436, where the optimizer of 1.0.weight steps, the loss is 0.04")
    assert incident.clip.loss_before < 0.1
    assert "shorter than its bound, because the step would have overshot" in str(incident.clip)
    assert not any("has risen" in line for line in incident.advice)  # the first optimizer's rate is another one


def test_gradients_that_are_all_zero_are_told_of_several_optimizers_too() -> None:
    """With the last loss: there is no level of both."""
    assert "in the last step, and every gradient has been zero since step 936" in unequal(silent=400).snapshot().ending


@pytest.mark.parametrize("every", [30, 60])
def test_a_generator_that_is_silent_but_for_some_turns_is_dead_until_it_lives(every: int) -> None:
    """Its loss is moved by the discriminator: that it is as low as ever says nothing, nor that it wakes up for one step."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    slow = torch.optim.Adam(generator.parameters(), lr=1e-3)
    fast = torch.optim.Adam(discriminator.parameters(), lr=2e-4)
    models = nn.ModuleDict({"G": generator, "D": discriminator})
    x, z = torch.randn(64, 2) / 10 + 3, torch.randn(64, 8)
    words = []
    with gradwatch.attach(models, report=None, strict=True) as monitor:
        for turn in range(1100):
            fake = generator(z)
            step(fast, bce(discriminator(x), torch.ones(64, 1)) + bce(discriminator(fake.detach()), torch.zeros(64, 1)))
            active = not (100 <= turn < 900 and turn % every)
            judged = -bce(discriminator(fake), torch.zeros(64, 1))
            step(slow, 1 - judged.detach() + (judged - judged.detach()) * active)
            words.append({one.verdict for one in monitor.incidents if one.kind == "dead"})
    assert words.index({"suspected"}) < 300
    assert words[300:900] == [{"suspected"}] * 600
    assert words[-1] == {"resolved"}


def test_a_second_optimizer_that_makes_its_first_step_early_is_no_new_task() -> None:
    """As of a generator after five steps of its critic, at another loss."""
    torch.manual_seed(2)
    generator = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    models = nn.ModuleDict({"G": generator, "D": critic})
    slow, fast = (torch.optim.RMSprop(module.parameters(), lr=2e-4) for module in (generator, critic))
    with gradwatch.attach(models, report=None, strict=True) as monitor:
        for _ in range(20):
            for _ in range(5):
                real = torch.randn(64, 2) + 1
                step(fast, critic(generator(torch.randn(64, 5)).detach()).mean() - critic(real).mean())
                with torch.no_grad():
                    for parameter in critic.parameters():
                        parameter.clamp_(-0.1, 0.1)
            step(slow, -critic(generator(torch.randn(64, 5))).mean())
        assert not any("new task" in note for note in monitor.notes)
