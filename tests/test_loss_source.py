"""A loss is computed again from its source: which source is understood, and that no code of the user's is called."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn

import gradwatch
from gradwatch.forensics.evaluate import Evaluator
from gradwatch.forensics.source import Scope
from gradwatch.forensics.standins import CannotRepeatError

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Scope(__file__, {})
heard: list[str] = []


class Weighted(nn.Module):
    """A loss that the user has written as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"a": 0.5, "b": 2.0}
        self.inner = nn.SmoothL1Loss()

    def scaled(self, x: Tensor, by: str = "a") -> Tensor:
        """Scale."""
        result: Tensor = x * self.weights[by]
        return result

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Run."""
        total = self.scaled(self.inner(x, y))
        for power in range(1, 3):
            total += self.scaled(x**power, by="b").mean()
        return total


class Cubed(torch.autograd.Function):
    """A function that the user has written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        """Return a multiple of the cube."""
        ctx.save_for_backward(x)
        ctx.by = by
        return by * x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient."""
        (x,) = ctx.saved_tensors
        return gradient * 3 * ctx.by * x * x, None


def helper(x: Tensor, *others: Tensor, eps: float = 1e-6, **more: Any) -> Tensor:
    """Compute something with all kinds of statements."""
    parts = [x.abs() + eps]
    for number, one in enumerate(others):
        if one.dim() == x.dim() and not one.isnan().any():
            last = one / (number + 1)
            parts.append(last)
    first, (_, _) = parts[0], (1, 2)
    with torch.autocast("cpu", enabled=False):
        total = torch.stack(parts).logsumexp(0)
    total = total.mean() + sum(p.sum() * w for p, w in zip(parts, (0.1, 0.2), strict=False))
    result: Tensor = total * more.get("scale", 1.0) + (math.log(2.0) if first is not None else 0)
    return result


def loops(x: Tensor, y: Tensor) -> Tensor:
    """Compute something with loops, and with changes in place of what is made here."""
    parts: dict[str, Tensor] = {}
    mask = torch.zeros_like(y)
    mask[y > 0] = 1.0
    left = 5
    while left:
        left -= 1
        if left == 3:
            continue
        if left == 1:
            break
        parts[f"part {left}"] = (x * mask).pow(2).sum() / (left + 1)
        parts["last"] = (x * mask).exp().mean()
    target = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0)
    weights = target.clone()
    weights.mul_(2).clamp_(max=1.5)
    hidden = x + 0.5
    F.relu(hidden, inplace=True)
    result: Tensor = parts["last"] + sum(parts.values()) + (weights * hidden).sum()
    return result


class Settings(NamedTuple):
    """Settings of a loss."""

    four: int = 4


functools_loss: Callable[..., Tensor] = functools.partial(F.l1_loss, reduction="sum")
limits = Settings()
settings = SimpleNamespace(alpha=0.3, name="huber")
weighted = Weighted()
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "functions of torch": lambda x, y: F.mse_loss(x, y) + torch.nn.functional.cross_entropy(x, y.argmax(1), label_smoothing=0.1),
    "modules of torch": lambda x, y: weighted.inner(y, x),
    "a module of the user's": lambda x, y: weighted(y=y, x=x),
    "statements": lambda x, y: helper(x, y, x.detach(), scale=2.0, eps=1e-3),
    "settings": lambda x, y: settings.alpha * (x - y).pow(2).mean() if settings.name == "huber" else x.sum(),
    "a partial function": lambda x, y: functools_loss(x, target=y),
    "a function of autograd": lambda x, y: Cubed.apply(x, 0.5).mean() + y.mean(),  # type: ignore[no-untyped-call]
    "indices and slices": lambda x, y: x[:, 0].sum() + x[y > 0].mean() - x[..., 1:2].max() + y.max(1).values.sum(),
    "containers": lambda x, y: sum([t.sum() for t in (x, y) if t.numel()], y.min()) / max(len(x), 1),
    "precision": lambda x, y: ((x.half() @ y.half().T).float() + torch.finfo(torch.float32).eps).mean(),
    "loops": loops,
    "comparisons": lambda x, y: torch.where((x > 0) & ~(y < 0) | (x == 0), x, -y).mean() * (1 if 8 >= limits.four < 9 else 2),
}  # fmt: skip


def never(_: Any) -> Any:
    """Stand for no call of a model."""
    return NotImplemented


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_computed_from_its_source_and_its_gradient_are_those_of_the_program(name: str) -> None:
    """To the bit."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    again = x.detach().clone().requires_grad_()
    expected, got = LOSSES[name](x, y), Evaluator(never).enter(LOSSES[name], (again, y), {})
    assert torch.equal(expected, got)
    expected.backward()
    got.backward()
    assert again.grad is not None
    assert x.grad is not None
    assert torch.equal(again.grad, x.grad)


class Counter:
    """Hears what is done to it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.total = 0.0

    def add(self, value: Any) -> Any:
        """Remember."""
        self.seen.append(value)
        return value

    @property
    def double(self) -> float:
        """Hear that it was read."""
        heard.append("property")
        return 2.0

    def __mul__(self, other: Any) -> Any:
        heard.append("operator")
        return other

    def __bool__(self) -> bool:
        heard.append("truth")
        return True

    def __getitem__(self, index: Any) -> Any:
        heard.append("item")
        return index


class Rate(float):
    """A number that hears."""

    def __mul__(self, other: Any) -> Any:
        heard.append("number")
        return other


rate = Rate(0.5)
counter, kept = Counter(), [torch.zeros(())]


def remember(x: Tensor) -> Tensor:
    """Append to a list of the program."""
    kept.append(x)
    return x


def count(x: Tensor) -> Tensor:
    """Change an object of the program."""
    counter.total = float(x.sum())
    return x


def globally(x: Tensor) -> Tensor:
    """Change a name of the program."""
    global kept  # noqa: PLW0603
    kept = []
    return x


def inner(x: Tensor) -> Tensor:
    """Define a function, import something, and try something, of which nothing counts."""

    def unused(y: Tensor) -> Tensor:
        return y.mul_(2)

    import os

    try:
        y = x.clone()
    except RuntimeError:
        os.abort()
    if counter.total is unused:  # type: ignore[comparison-overlap]
        raise RuntimeError
    counter.weight = y  # type: ignore[attr-defined]
    return counter.weight  # type: ignore[attr-defined,no-any-return]


def by_element(x: Tensor) -> Tensor:
    """Write into a tensor."""
    x[0] = 0
    return x


def in_place(x: Tensor) -> Tensor:
    """Return a tensor that is written to."""
    with torch.no_grad():
        return x.mul_(2)


def appended(x: Tensor) -> Any:
    """Return what was appended to a list of the program."""
    kept.append(x * 2)
    return kept[-1].sum()


def counted(x: Tensor) -> Tensor:
    """Return a number that a loop has counted in a way that is not understood."""
    number = 0
    for _ in map(counter.add, range(3)):
        number += 1
    return x * number


def stopped(x: Tensor) -> Tensor:
    """Return in the middle of a loop that is not understood."""
    for one in map(counter.add, x):
        if one is x:
            break
        return x * 2
    return x


LEFT_OUT: dict[str, Callable[[Tensor], Any]] = {
    "a method that remembers": lambda x: counter.add(x) * 1,
    "a list of the program": remember,
    "an attribute of an object": count,
    "a global name": globally,
    "a property that is heard": lambda x: x * counter.double / 2,
    "an item that is heard": lambda x: x * counter[1],
    "definitions and attempts": inner,
}
SIDE_EFFECTS: dict[str, Callable[[Tensor], Any]] = {
    "what a list of the program holds": appended,
    "a loop": counted,
    "the end of a loop": stopped,
    "an element of a tensor": by_element,
    "a tensor in place": in_place,
    "an operator of a class": lambda x: counter * x,
    "an operator of a kind of number": lambda x: rate * x,
    "the truth of an object": lambda x: x if counter else -x,
    "printing": lambda x: print(x) or x,  # noqa: T201
    "the generator": lambda x: torch.manual_seed(0) and x,
    "a file": lambda x: torch.save(x, "/nowhere/at/all") or x,  # type: ignore[func-returns-value]
    "another backward": lambda x: x.sum().backward() or x,
    "an output given": lambda x: torch.log(x, out=x),
    "an object given to a function": lambda x: sum([counter, x]),
    "an import": lambda x: __import__("os") and x,
    "a key": lambda x: sorted([1, 2], key=counter.add) and x,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_statement_that_may_do_more_than_compute_is_left_out_if_nothing_depends_on_it(name: str) -> None:
    """Nothing of the program has changed or was called, and the result is that of the program."""
    x = torch.randn(4)
    assert torch.equal(Evaluator(never).enter(LEFT_OUT[name], (x,), {}), x)
    assert (heard, counter.seen, counter.total, len(kept)) == ([], [], 0.0, 1)


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_source_that_may_do_more_than_compute_is_refused_before_it_does(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the program has changed or was called."""
    x = torch.randn(4)
    before, state = x.clone(), torch.get_rng_state()
    with pytest.raises(CannotRepeatError):
        Evaluator(never).enter(SIDE_EFFECTS[name], (x,), {})
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (heard, counter.seen, counter.total, len(kept), capsys.readouterr().out) == ([], [], 0.0, 1, "")


def found_by(loss: Callable[[Tensor], Tensor]) -> gradwatch.Origin | None:
    """Return what a monitor finds if this is the loss of a linear model."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6), torch.randn(9, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        loss(model(x)).backward()
        optimizer.step()
    return next((one.origin for one in monitor.incidents if one.origin is not None), None)


class Penalty:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Compute and count."""
        self.calls += 1
        return (x * 0).log().mean()


def test_a_loss_that_is_not_understood_is_judged_by_its_graph_and_not_called_again() -> None:
    """An object that counts has counted one call."""
    penalty = Penalty()
    found = found_by(penalty)
    assert found is not None
    assert (found.op, found.found_by, found.line, penalty.calls) == ("log", "graph", 0, 1)


def test_a_loss_that_draws_random_numbers_is_not_computed_again() -> None:
    """It would be another loss."""
    found = found_by(lambda out: (out.abs() + torch.rand(()) - 0.5).log().mean())
    assert found is None or found.found_by == "graph"


state = {"large": False}


def test_a_loss_whose_source_now_means_another_is_not_named_by_it() -> None:
    """Another graph is another loss, although both are NaN."""

    def loss(out: Tensor) -> Tensor:
        result = (out * 0).sqrt().log().mean() * 0 if not state["large"] else (out * 1e30).exp().mean() * 0
        state["large"] = True
        return result

    found = found_by(loss)
    assert found is None or (found.op, found.found_by) == ("log", "graph")


def test_a_penalty_on_weights_leaves_their_gradients_as_they_are() -> None:
    """The backward that is computed again reaches the output of the model and nothing else."""

    def train(*, watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = nn.Linear(6, 6), torch.randn(9, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = gradwatch.attach(model, report=None, strict=True, forensics=True) if watch else None
        loss = (model(x) * 0).abs().sqrt().mean() + sum(one.pow(2).sum() for one in model.parameters())
        loss.backward()
        gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        optimizer.step()
        if monitor is not None:
            found = monitor.incidents[0].origin
            assert found is not None
            assert (found.op, found.found_by, found.direction) == ("sqrt", "source", "backward")
            monitor.detach()
        return gradients

    for one, other in zip(train(watch=True), train(watch=False), strict=True):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
