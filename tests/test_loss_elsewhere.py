"""A loss that is computed in another function than the one that calls backward: its line is known, or nothing is said of it."""

from __future__ import annotations

import linecache
import weakref
from collections import OrderedDict
from dataclasses import dataclass
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
        self.model: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.batch = torch.randn(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
        self.root = False

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        out: Tensor = self.model(x)
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


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """What a model returns in transformers: a dataclass that is a dict too."""

    logits: Any = None
    cache: Any = None

    def __post_init__(self) -> None:
        """Be a dict of what is there."""
        self["logits"] = self.logits


class Wrapped(nn.Module):
    """A model that returns such an output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Output:
        """Run."""
        return Output(self.inner(x), cache=object())


class Trainer:
    """A trainer as libraries write them: it calls backward itself, when the function that computed the loss has ended."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = training.model
        self.logged: dict[str, float] = {}
        self.batches = 2

    @property
    def scale(self) -> float:
        """A property that another one computes."""
        return 1.0 / self.batches

    def log(self, name: str, value: Tensor) -> None:
        """Remember a number."""
        self.logged[name] = float(value.detach())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Return the loss, and what the model has returned."""
        outputs = model(inputs["x"])
        logits = outputs.logits if isinstance(outputs, Output) else outputs
        loss = nn.MSELoss()(logits, inputs["y"])
        if getattr(self, "label_smoother", None) is not None:
            raise NotImplementedError
        loss *= 1
        return loss, logits

    def step(self, batch: Any) -> Tensor:
        """Return the loss of a batch, for a loop that deletes the batch before it calls backward."""
        inputs = dict(zip("xy", batch, strict=True))
        loss, _ = self.compute_loss(self.model, inputs)
        del inputs
        return loss * self.scale

    def train(self) -> None:
        """Run a step in closures."""
        batch = self.training.batch

        def closure() -> Tensor:
            loss = self.step(batch)
            self.training.optimizer.zero_grad()
            backward_of(loss)
            return loss

        self.training.optimizer.step(closure)


class Penalised(Trainer):
    """Overrides the loss, with what the model has returned; logs it, and something that is not understood beside it."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Return a loss with a penalty."""
        loss, out = super().compute_loss(model, inputs)
        penalty = self.training.criterion(out, inputs["y"])
        self.log("penalty", penalty)
        score = len({round(one, 3) for one in out.flatten().tolist()})
        self.log("score", torch.tensor(score))
        total = loss + 0.1 * penalty
        self.last = total
        return total, out


class Own(Trainer):
    """Computes the loss by itself, under autocast, from a model that is called twice."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Return a loss."""
        x, y = inputs["x"], inputs["y"]
        with torch.autocast("cpu", torch.bfloat16):
            one, other = model(x), model(x * 2)
        if isinstance(one, Output):
            one, other = one.logits, other.logits
        return self.training.criterion(one.float(), y) + other.pow(2).mean(), one


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", [Penalised, Own])
def test_the_line_is_named_when_a_trainer_calls_backward_after_the_function_of_the_loss_has_ended(
    kind: type[Trainer], *, wrapped: bool, root: bool
) -> None:
    """By the names that the function had when it called the model; what it logged is logged once."""
    training = Training()
    training.root = root
    if wrapped:
        training.model = Wrapped()
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)
    trainers: list[Trainer] = []

    def program(training: Training) -> None:
        trainers.append(kind(training))
        trainers[0].train()

    found = origin_of(program, training)
    assert found is not None
    assert (found.op, found.direction) == (("sqrt", "backward") if root else ("log", "forward"))
    assert (found.found_by, found.part) == ("source", "loss code")
    assert (".sqrt()" if root else ".log()") in linecache.getline(found.file, found.line)
    assert list(trainers[0].logged) == (["penalty", "score"] if kind is Penalised else [])


def origin_of(program: Callable[[Training], None], training: Training) -> gradwatch.Origin | None:
    """Return what a monitor has found."""
    with gradwatch.attach(training.model, report=None, strict=True, forensics=True) as monitor:
        program(training)
    return next((one.origin for one in monitor.incidents if one.origin is not None), None)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("program", [returned, in_a_dict, accumulated, given_to_a_function, over_time, alike])
def test_the_line_of_a_loss_in_another_function_is_named(program: Callable[[Training], None], *, root: bool) -> None:
    """By its source, in the forward and in the backward, whichever functions have ended since."""
    training = Training()
    training.root = root
    found = origin_of(program, training)
    assert found is not None
    assert (found.op, found.direction) == (("sqrt", "backward") if root else ("log", "forward"))
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


def test_what_a_step_remembers_is_not_remembered_twice() -> None:
    """Statements on which the loss does not depend are left out, and those on which it does are not run for a second time."""
    seen: list[Tensor] = []

    def remembers(training: Training) -> Tensor:
        loss = training.training_step(training.batch)
        seen.append(loss.detach())
        return loss

    def counts(training: Training) -> Tensor:
        loss = training.training_step(training.batch)
        seen.append(loss)
        return seen[-1] + len(seen)

    for step in (remembers, counts):
        seen.clear()

        def program(training: Training, step: Callable[[Training], Tensor] = step) -> None:
            step(training).backward()
            training.optimizer.step()

        found = origin_of(program, Training())
        assert len(seen) == 1
        assert found is not None
        assert (found.op, found.found_by) == ("log", "source" if step is remembers else "graph")
        assert bool(found.line) is (step is remembers)


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


class Held:
    """Something that a function holds."""


def test_the_names_of_a_function_are_kept_until_its_step_is_over_and_a_large_tensor_no_longer_than_by_the_function() -> (
    None
):
    """So that nothing is held that a program without gradwatch would have dropped."""
    training = Training()
    small: list[weakref.ref[Held]] = []
    large: list[weakref.ref[Tensor]] = []

    def step() -> Tensor:
        held, tensor = Held(), torch.zeros(5_000_000)
        small.append(weakref.ref(held))
        large.append(weakref.ref(tensor))
        out = training.model(training.batch[0])
        del tensor
        assert large[-1]() is None
        loss: Tensor = out.pow(2).mean()
        return loss

    with gradwatch.attach(training.model, report=None, strict=True, forensics=True):
        for _ in range(3):
            loss = step()
            backward_of(loss)
            training.optimizer.step()
            assert small[-1]() is None


def test_a_function_that_asks_for_its_names_sees_no_others() -> None:
    """Before Python 3.13 `locals()` is one dict, which changes whenever somebody reads it."""
    training = Training()

    def step(rate: float) -> Tensor:
        settings = locals()
        out = training.model(training.batch[0])
        assert "settings" not in settings
        loss: Tensor = out.pow(2).mean() * rate
        return loss

    with gradwatch.attach(training.model, report=None, strict=True, forensics=True):
        step(0.5).backward()
        training.optimizer.step()
