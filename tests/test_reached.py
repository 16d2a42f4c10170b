"""A backward that is repeated ends at the first gradient of a weight whose origin is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.forensics.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH, DEPTH = 16, 6, 12


class Step(nn.Module):
    """A linear layer and an operation."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.run(self.linear(x))


def root(x: Tensor) -> Tensor:
    """Take the root of positive numbers."""
    return (x * (x > 0)).sqrt()


def fails_behind_a_mask(x: Tensor) -> Tensor:
    """Have a singular backward whose gradient is masked, so that it reaches nothing."""
    return torch.where(x > 0, x, (x * 0 + 1).tanh()) + Dropped.apply(x)  # type: ignore[no-untyped-call,no-any-return]


class Dropped(torch.autograd.Function):
    """Makes a gradient that is not finite, of which nothing is left."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # noqa: ARG004
        """Return nothing."""
        return x * 0

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        """Make a NaN, and replace it."""
        return ((gradient * 0).log() * 0).nan_to_num()


def watched(at: dict[int, Callable[[Tensor], Tensor]]) -> tuple[gradwatch.Origin | None, int]:
    """Train one step of a deep model with an operation in some places; return the finding, and the number of operations."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Step(at.get(place, torch.tanh)) for place in range(DEPTH)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    traces: list[Trace] = []
    make = Trace.__init__

    def remember(self: Trace, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]
        traces.append(self)

    with (
        pytest.MonkeyPatch.context() as patch,
        gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor,
    ):
        patch.setattr(Trace, "__init__", remember)
        model(torch.randn(ROWS, WIDTH)).pow(2).mean().backward()
        optimizer.step()
    origin = next((one.origin for one in monitor.incidents if one.origin is not None), None)
    return origin, sum(one.count for one in traces)


def test_what_comes_after_the_first_gradient_with_one_origin_is_not_repeated() -> None:
    """The nearer to the end of the model the fault is, the sooner it is found in the backward."""
    found, early = watched({DEPTH - 1: root})
    assert found is not None
    assert (found.op, found.direction, found.module) == ("sqrt", "backward", str(DEPTH - 1))
    found, late = watched({0: root})
    assert found is not None
    assert (found.op, found.direction, found.module) == ("sqrt", "backward", "0")
    assert late - early > 3 * (DEPTH - 2)


def test_of_two_that_fail_the_one_that_reaches_a_gradient_first_is_named() -> None:
    """It would have failed without the other one."""
    found, _ = watched({2: root, 8: root})
    assert found is not None
    assert (found.op, found.module) == ("sqrt", "8")


def test_what_reaches_no_gradient_ends_nothing() -> None:
    """The operation behind it is named."""
    found, _ = watched({8: fails_behind_a_mask, 3: root})
    assert found is not None
    assert (found.op, found.direction, found.module) == ("sqrt", "backward", "3")
