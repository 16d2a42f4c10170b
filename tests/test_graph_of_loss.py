"""What the graph of a loss says where its source is not understood: an operation that did fail, as it did, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 16, 6
EMPTY = torch.ones(ROWS, 1)
EMPTY[3] = 0
INFINITE = torch.ones(ROWS, WIDTH)
INFINITE[0] = torch.inf
THOUSAND = torch.full((ROWS, WIDTH), 1000.0, dtype=torch.float16)
ONES = torch.ones(ROWS, WIDTH)
BASE = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
BASE[0, 0] = 0
WEIGHTS = torch.tensor([0.0, *[1.0] * (WIDTH - 1)])


class Failing(torch.autograd.Function):
    """A function whose backward returns NaN, of which its graph keeps nothing."""

    @staticmethod
    def forward(_: Any, h: Tensor) -> Tensor:
        """Return a copy."""
        return h.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Return NaN."""
        return gradient * torch.nan


class Model(nn.Module):
    """A layer, and what follows it."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.run(self.layer(x))


class Counted:
    """An object that counts its calls, so that the source of a loss does more than compute."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, loss: Tensor) -> Tensor:
        """Count."""
        self.calls += 1
        return loss


def found_of(loss_of: Callable[[Tensor], Tensor], outputs: Callable[[Tensor], Tensor] = torch.sigmoid) -> str:
    """Train one step; return what is found, or an empty text."""
    torch.manual_seed(0)
    model = Model(outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None, forensics=True, strict=True)
    count = Counted()
    loss = count(loss_of(model(torch.randn(ROWS, WIDTH))))
    loss.backward()
    assert count.calls == 1
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert not loss.isfinite() or not all(one.isfinite().all() for one in gradients)
    optimizer.step()
    monitor.detach()
    return next((str(one.origin) for one in monitor.incidents if one.origin is not None), "")


def aligned(h: Tensor) -> Tensor:
    """Return a loss of alignments that is finite; what it keeps for its backward holds -inf."""
    return F.ctc_loss(h.log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([ROWS]), torch.tensor([2]))


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a quotient by zero that where drops": lambda h: (
        torch.where(EMPTY > 0, h / EMPTY, 0.0).mean() + (h + INFINITE).mean()
    ),
    "a quotient by an integer zero that where drops": lambda h: (
        torch.where(EMPTY > 0, h / EMPTY.long(), 0.0).mean() + (h + INFINITE).mean()
    ),
    "an alignment that is well": lambda h: aligned(h) + (h + INFINITE).mean(),
    "a power of zero by an exponent that is learned": lambda h: (
        (BASE**h).mean() + Failing.apply(h).mean()  # type: ignore[no-untyped-call]
    ),
    "a root whose gradient an exponent of zero drops": lambda h: (
        ((h**0.0) - 1).sqrt().mean() + Failing.apply(h).mean()  # type: ignore[no-untyped-call]
    ),
    "a quotient by a small number": lambda h: (h * 0 / torch.tensor(1e-40)).mean() + (h + INFINITE).mean(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_did_not_fail_is_not_named(name: str) -> None:
    """Another operation has, of which the graph keeps nothing."""
    assert found_of(UNKNOWN[name]) == ""


def test_a_mean_may_overflow_although_it_returns_nothing_larger_than_it_got() -> None:
    """So a product before it is not the only one that may have."""
    assert found_of(lambda h: (h * ONES).mean(), lambda h: h.sigmoid() * 1e38 + 2e38) == ""
    named = found_of(lambda h: (h * THOUSAND).float().mean(), lambda h: (h * 0 + 100).half())
    assert named.startswith("`mul` outside of the model (forward)")


KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a quotient of which the divisor alone is kept": (
        lambda h: (h * 0 / EMPTY).mean(),
        "`div` outside of the model (forward) got 1 zero of 16 to divide by and returned a non-finite value",
    ),
    "labels whose weights are zero": (
        lambda h: F.cross_entropy(h, torch.zeros(ROWS, dtype=torch.long), WEIGHTS),
        "`nll_loss` outside of the model (forward) got labels whose weights add up to 0 and returned 1 NaN of 1",
    ),
    "labels that are ignored": (
        lambda h: F.cross_entropy(h, torch.full((ROWS,), -100)),
        "`nll_loss` outside of the model (forward) got only labels that are ignored and returned 1 NaN of 1",
    ),
    "a power that overflows beside zeros": (
        lambda h: ((h - 0.5).relu() * 1e20).pow(3).mean(),
        "`pow` outside of the model (forward) got float32 numbers up to 3.59e19 and returned ",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_said_is_what_happened(name: str) -> None:
    """Only the divisor of a quotient is kept, so that what it returned is not known."""
    loss_of, text = KNOWN[name]
    assert found_of(loss_of).startswith(text)


heard: list[str] = []


class Heard(torch.autograd.Function):
    """A function that hears how often it is called."""

    @staticmethod
    def forward(_: Any, h: Tensor) -> Tensor:
        """Double."""
        heard.append("forward")
        return 2 * h

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Double."""
        heard.append("backward")
        return 2 * gradient


def hooked(h: Tensor) -> Tensor:
    """Have hooks on all tensors."""
    logs = (h * EMPTY).log()
    for one in (h, logs):
        one.register_hook(lambda _: heard.append("hook"))
    return logs.mean()


def packed(h: Tensor) -> Tensor:
    """Keep what the backward needs elsewhere."""

    def hear(kept: Tensor) -> Tensor:
        heard.append("kept")
        return kept

    with torch.autograd.graph.saved_tensors_hooks(hear, hear):
        return (h * EMPTY).log().mean()


def listening(h: Tensor) -> Tensor:
    """Drop something at random, and hear how often."""
    heard.append("checkpoint")
    return F.dropout(h, 0.5).sqrt()


RUNS_CODE: dict[str, Callable[[Tensor], Tensor]] = {
    "a function after": lambda h: Heard.apply((h * EMPTY).log()).mean(),  # type: ignore[no-untyped-call]
    "a function before": lambda h: (Heard.apply(h) * EMPTY).log().mean(),  # type: ignore[no-untyped-call]
    "hooks": hooked,
    "what is kept elsewhere": packed,
    "a checkpoint": lambda h: checkpoint(listening, (h * EMPTY).log(), use_reentrant=False).mean(),
    "a checkpoint, reentrant": lambda h: checkpoint(listening, (h * EMPTY).log(), use_reentrant=True).mean(),
    "a checkpoint around it": lambda h: checkpoint(lambda h: listening(h * EMPTY).log(), h, use_reentrant=False).mean(),
}


@pytest.mark.parametrize("name", RUNS_CODE)
def test_no_code_of_the_program_is_run_for_a_graph(name: str) -> None:
    """Neither in the step that fails nor in those that are well; the program hears as much as without gradwatch."""
    runs = []
    for watch in (False, True):
        torch.manual_seed(0)
        heard.clear()
        model, count = Model(torch.sigmoid), Counted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = gradwatch.attach(model, report=None, forensics=True, strict=True) if watch else None
        for fails in (False, False, True):
            EMPTY[3] = float(not fails)
            optimizer.zero_grad()
            loss = count(RUNS_CODE[name](model(torch.randn(ROWS, WIDTH))))
            loss.backward()
            optimizer.step()
        runs.append(([*heard], count.calls, torch.get_rng_state().tolist()))
        if monitor is not None:
            assert not loss.isfinite()
            found = [one.origin.op for one in monitor.incidents if one.origin is not None]
            assert found in ([], ["log"])
            assert found or name not in ("hooks", "a function before")
            monitor.detach()
    EMPTY[3] = 0
    assert runs[0] == runs[1]
