"""States of a monitor that are damaged or foreign: refused whole, with what is wrong, or taken and good to train with."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from tests.trainings import mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GONE = object()

DAMAGES: dict[str, Any] = {
    "deleted": lambda _: GONE,
    "None": lambda _: None,
    "text": lambda _: "3",
    "NaN": lambda _: math.nan,
    "infinite": lambda _: math.inf,
    "negative": lambda _: -1,
    "too large": lambda _: 10**400,
    "true": lambda _: True,
    "a list": lambda value: [value],
    "a dict": lambda value: {"it": value},
    "an array": lambda _: np.zeros(2),
    "an array of the same length": lambda value: np.array(value) if isinstance(value, list) else GONE,
    "a tensor": lambda value: torch.zeros(len(value) if isinstance(value, list) else 1),
    "shorter": lambda value: value[:-1] if isinstance(value, list) else GONE,
    "longer": lambda value: [*value, *value[-1:]] if isinstance(value, list) else GONE,
    "holds arrays": lambda value: [np.zeros(2) for _ in value] if isinstance(value, list) else GONE,
}


class FailsToShow:
    """A thing whose text cannot be made."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def train(model: nn.Module, steps: int) -> None:
    """Train for some steps; one layer gets no gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=generator)
        model[:5](x).pow(2).mean().backward()  # type: ignore[index]
        optimizer.step()


def network() -> nn.Sequential:
    """Return a network whose last layer is never used."""
    model = mlp()
    model.append(nn.Linear(1, 1))
    return model


def watched(model: nn.Module) -> gradwatch.Monitor:
    """Watch with auto-clip, so that all that reads a baseline runs; an error inside gradwatch is raised."""
    return gradwatch.attach(model, clip="norm", report=None, strict=True)


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """Return the state after 30 steps."""
    model = network()
    with watched(model) as monitor:
        train(model, 30)
        return monitor.state_dict()


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each entry, of a list the way to its first and last element."""
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in inside:
        if isinstance(state, dict) or key in (0, len(state) - 1):
            yield (*path, key)
            yield from places(value, (*path, key))


def damaged(state: dict[str, Any], path: tuple[Any, ...], damage: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a copy in which one entry is another."""
    state = copy.deepcopy(state)
    inside: Any = state
    for key in path[:-1]:
        inside = inside[key]
    value = damage(inside[path[-1]])
    if value is GONE:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return state


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_entry_that_is_damaged_is_refused_whole_or_good_to_train_with(saved: dict[str, Any], damage: str) -> None:
    """`UsageError` says where, what was found and what was expected; what the monitor knew before it still knows."""
    refused = 0
    model = network()
    with watched(model) as monitor:
        train(model, 12)
        for path in places(saved):
            state = damaged(saved, path, DAMAGES[damage])
            before = repr(monitor.state_dict())
            try:
                monitor.load_state_dict(state)
            except gradwatch.UsageError as error:
                said = str(error)
            else:
                train(model, 20)
                continue
            refused += 1
            assert repr(monitor.state_dict()) == before
            assert str(path[0]) in said or "other layers" in said
            assert "expected" in said or "Load it into a monitor of the same model" in said
            assert "Nothing was restored" in said
        assert all("no gradient has reached 5.weight" in note for note in monitor.notes)  # it is left out of the loss
        assert monitor.verdict == "healthy"
    assert refused > (20 if damage != "an array of the same length" else 0)


@pytest.mark.parametrize(
    "state", [None, [], [1, 2], "state", 3, {}, FailsToShow(), {"step": 3, "history": FailsToShow()}]
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    """A list, text, nothing at all, a thing whose text cannot be made."""
    model = network()
    with watched(model) as monitor:
        train(model, 3)
        before = repr(monitor.state_dict())
        with pytest.raises(gradwatch.UsageError, match="expected a dict with"):
            monitor.load_state_dict(state)
        assert repr(monitor.state_dict()) == before


def test_a_state_of_another_version_is_refused_and_one_without_a_version_is_taken(saved: dict[str, Any]) -> None:
    """The number says of which form it is; states were first saved without one."""
    model = network()
    with watched(model) as monitor:
        with pytest.raises(gradwatch.UsageError, match=r'found 2 as state\["version"\]; expected 1'):
            monitor.load_state_dict({**saved, "version": 2})
        monitor.load_state_dict({name: value for name, value in saved.items() if name != "version"})
        assert repr(monitor.state_dict()) == repr(saved)


def test_a_state_of_another_model_is_refused_by_the_first_layer_that_differs(saved: dict[str, Any]) -> None:
    """Also one of as many layers."""
    state = copy.deepcopy(saved)
    state["history"]["layers"][1] = "head.bias"
    model = network()
    with (
        watched(model) as monitor,
        pytest.raises(gradwatch.UsageError, match=r"'head\.bias' where '0\.bias' is watched"),
    ):
        monitor.load_state_dict(state)


def test_a_state_is_not_kept_by_reference(saved: dict[str, Any]) -> None:
    """Training on does not change the state that was loaded, also where it holds arrays."""
    state = copy.deepcopy(saved)
    typical = state["history"]["typical_grad"]
    typical.update({name: np.array(values) for name, values in typical.items()})
    before = repr(state)
    model = network()
    with watched(model) as monitor:
        monitor.load_state_dict(state)
        train(model, 20)
    assert repr(state) == before
