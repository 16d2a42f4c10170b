"""A loss that is computed in another function than the one that calls backward: its line is known, or nothing is said of it."""

from __future__ import annotations

import linecache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 16, 6


class Training:
    """A training of one step, as programs write it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(WIDTH, WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.batch = torch.randn(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
        self.root = False

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        out = self.model(x)
        return self.criterion(out, y)

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        """Return a loss that fails in its forward, or in its backward."""
        h = (out - y) * (out > 0)
        if self.root:
            return h.abs().sqrt().mean()
        return h.log().mean()


def backward_of(loss: Tensor) -> None:
    """Call backward, as accelerators do."""
    loss = loss / 2
    loss.backward()


def returned(training: Training) -> None:
    """Take the loss from a function."""
    loss = training.training_step(training.batch)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()


def in_a_dict(training: Training) -> None:
    """Take the loss out of a dict, and scale it."""

    def step(batch: Any) -> dict[str, Tensor]:
        return {"loss": training.training_step(batch), "size": torch.tensor(len(batch[0]))}

    for batch in [training.batch]:
        found = step(batch)
        loss = found["loss"]
        (loss * 3).backward()
    training.optimizer.step()


def accumulated(training: Training) -> None:
    """Fail in the last of three backwards."""
    x, y = training.batch
    for number in range(3):
        loss = training.training_step((x, y)) / 3 if number == 2 else training.model(x).pow(2).mean() / 3
        loss.backward()
    training.optimizer.step()


def given_to_a_function(training: Training) -> None:
    """Have another function call backward."""
    loss = training.training_step(training.batch)
    backward_of(loss)
    training.optimizer.step()


def over_time(training: Training) -> None:
    """Call the model several times."""
    start, y = training.batch
    x, total = start, torch.zeros(())
    for _ in range(3):
        x = training.model(x)
        total = total + x.pow(2).mean()
    loss = total + training.criterion(x, y)
    loss.backward()
    training.optimizer.step()


def alike(training: Training) -> None:
    """Compare what the model gives of two inputs."""
    x, _ = training.batch
    one, other = training.model(x), training.model(x.flip(0))
    loss = training.criterion(one, other)
    loss.backward()
    training.optimizer.step()


def origin_of(program: Callable[[Training], None], training: Training) -> gradwatch.Origin | None:
    """Return what a monitor has found."""
    with gradwatch.attach(training.model, report=None, strict=True, forensics=True) as monitor:
        program(training)
    return next((one.origin for one in monitor.incidents if one.origin is not None), None)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("program", [returned, in_a_dict, accumulated, given_to_a_function, over_time, alike])
def test_the_line_of_a_loss_in_another_function_is_named(program: Callable[[Training], None], *, root: bool) -> None:
    """By its source, in the forward and in the backward; not if the function that called backward has ended since."""
    training = Training()
    training.root = root
    found = origin_of(program, training)
    assert found is not None
    assert (found.op, found.direction) == (("sqrt", "backward") if root else ("log", "forward"))
    if root and program is given_to_a_function:
        assert (found.found_by, found.line) == ("graph", 0)
        return
    assert (found.found_by, found.part) == ("source", "loss code")
    assert (".sqrt()" if root else ".log()") in linecache.getline(found.file, found.line)


def test_a_loss_whose_source_would_now_take_another_branch_is_judged_by_its_graph() -> None:
    """What is computed again counts only if it has the same graph."""

    def program(training: Training) -> None:
        loss = training.training_step(training.batch)
        training.root = True
        loss.backward()
        training.optimizer.step()

    found = origin_of(program, Training())
    assert found is not None
    assert (found.op, found.direction, found.found_by, found.line) == ("log", "forward", "graph", 0)


def test_a_step_that_remembers_something_is_not_computed_again() -> None:
    """It would remember it twice."""
    seen: list[Tensor] = []

    def step(training: Training) -> Tensor:
        loss = training.training_step(training.batch)
        seen.append(loss.detach())
        return loss

    def program(training: Training) -> None:
        loss = step(training)
        loss.backward()
        training.optimizer.step()

    found = origin_of(program, Training())
    assert len(seen) == 1
    assert found is not None
    assert (found.op, found.found_by, found.line) == ("log", "graph", 0)


@pytest.mark.parametrize("inner", [nn.ReLU(), nn.Dropout(0.5)])
def test_the_output_of_another_model_is_computed_again_if_it_is_made_of_modules_that_keep_nothing(
    inner: nn.Module,
) -> None:
    """One that draws random numbers is not."""
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), inner)

    def program(training: Training) -> None:
        x, _ = training.batch
        out, weight = training.model(x), other(x)
        loss = (out.sigmoid() * weight.clamp_min(0).log()).mean()
        loss.backward()
        training.optimizer.step()

    found = origin_of(program, Training())
    assert found is not None
    assert (found.op, found.direction) == ("log", "forward")
    if isinstance(inner, nn.ReLU):
        assert found.found_by == "source"
        assert ".log()" in linecache.getline(found.file, found.line)
    else:
        assert (found.found_by, found.line) == ("graph", 0)
