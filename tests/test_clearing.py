"""Gradients that are never cleared, or cleared before the step, are a mistake, told once; ways to clear them are recognised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

TOLD = "gradients are not cleared"


def told(notes: list[str]) -> int:
    """Return how many of the notes are on gradients that are not cleared."""
    return sum(TOLD in note for note in notes)


def trained(
    clear: Callable[[Optimizer, int], object],
    kind: type[Optimizer] = torch.optim.Adam,
    steps: int = 80,
    **settings: Any,
) -> gradwatch.Monitor:
    """Train a classifier and clear the gradients before each backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:
        for step in range(steps):
            x = torch.randn(64, 8)
            clear(optimizer, step)
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    return monitor


def by_data(optimizer: Optimizer, _: int) -> None:
    """Clear as old programs do, so that torch does not count the change."""
    for group in optimizer.param_groups:
        for one in group["params"]:
            if one.grad is not None:
                one.grad.data.zero_()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("settings", [{}, {"clip": "norm"}, {"every": 4}], ids=str)
def test_gradients_that_are_never_cleared_are_told_once(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    """Adam hides it: the loss falls all the same."""
    assert told(trained(lambda *_: None, kind, **settings).notes) == 1


@pytest.mark.parametrize(
    "clear",
    [
        lambda optimizer, _: optimizer.zero_grad(),
        lambda optimizer, _: optimizer.zero_grad(set_to_none=False),
        by_data,
        lambda optimizer, step: step % 8 == 0 and optimizer.zero_grad(),
    ],
    ids=["to None", "to zero", "by data", "now and then"],
)
def test_a_program_that_clears_them_is_not_accused(clear: Callable[[Optimizer, int], object]) -> None:
    """Even where some steps share gradients."""
    assert not told(trained(clear).notes)


def test_a_critic_may_leave_gradients_in_the_generator_if_these_are_cleared_before_its_own_backward() -> None:
    """Without a detach, the critic's loss reaches the generator too."""

    def notes(*, clears: bool) -> list[str]:
        torch.manual_seed(0)
        generator, critic = nn.Linear(4, 8), nn.Linear(8, 1)
        first, second = (torch.optim.Adam(one.parameters(), 1e-3) for one in (generator, critic))
        both = nn.ModuleList([generator, critic])
        with gradwatch.attach(both, report=None, strict=True) as monitor:
            for _ in range(30):
                noise = torch.randn(16, 4)
                second.zero_grad()
                (critic(generator(noise)).mean() - critic(torch.randn(16, 8)).mean()).backward()
                second.step()
                if clears:
                    first.zero_grad()
                (-critic(generator(noise)).mean()).backward()
                first.step()
        return monitor.notes

    assert not told(notes(clears=True))
    assert told(notes(clears=False)) == 1


def test_accumulation_and_a_closure_that_clears_are_no_mistake() -> None:
    """Several backwards for one step, and several evaluations of one closure."""
    x = torch.randn(32, 8)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(120):
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert not told(monitor.notes)
    search = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        return loss

    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(12):
            search.step(closure)
    assert not told(monitor.notes)


def test_it_is_the_first_advice_where_the_run_explodes() -> None:
    """The cause comes before what to do about large gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(64, 8)
            nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
    grave = [incident for incident in monitor.incidents if incident.severity != "notice"]
    assert grave
    assert TOLD in grave[-1].advice[0].lower()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_cleared_before_the_step_are_told_once_and_are_the_first_advice(to_none: bool) -> None:
    """The optimizer gets nothing; the parts that do not learn are not blamed for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(120):
            x = torch.randn(64, 8)
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()
    early = "gradients are cleared between backward() and optimizer.step()"
    assert sum(early in note for note in monitor.notes) == 1
    assert monitor.verdict == "suspected"
    for incident in monitor.incidents:
        assert early in incident.advice[0].lower()


def test_what_a_step_leaves_out_now_and_then_is_not_taken_for_clearing_too_early() -> None:
    """Each third backward is dropped, a line search clears before its closure, and a step clears after it."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer, search = torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.LBFGS(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(60):
            x = torch.randn(64, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            loss.backward()
            if number % 3 == 0:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            loss.backward()
            return loss

        for _ in range(20):
            search.zero_grad()
            search.step(closure)
    assert not any("cleared" in note for note in monitor.notes)
