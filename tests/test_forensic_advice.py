"""What is advised for an operation, tried on the program that failed: afterwards its loss and gradients are finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom", r"ignore:var\(\). degrees of freedom")
ROWS, WIDTH = 8, 6
ZERO = (torch.arange(ROWS) == 5)[:, None]
WEIGHTS = torch.tensor([0.0, *[1.0] * (WIDTH - 1)])
LABELS = torch.full((ROWS,), -100)
EIGEN = torch.diag(torch.arange(WIDTH) * 1e-2)
SMALLEST = torch.finfo(torch.float32).min


def some_zero(h: Tensor) -> Tensor:
    """Put a row to zero."""
    return h * ~ZERO


def masked(h: Tensor, value: float = -torch.inf) -> Tensor:
    """Mask a row altogether."""
    return h.masked_fill(ZERO, value)


def one_kept(h: Tensor) -> Tensor:
    """Mask a row but for one position."""
    return h.masked_fill(ZERO & (torch.arange(WIDTH) > 0), -torch.inf)


def ctc(h: Tensor, *, zero_infinity: bool = False) -> Tensor:
    """Return the loss of five labels in two frames."""
    frames, lengths = h.log_softmax(1)[:2, None], (torch.tensor([2]), torch.tensor([5]))
    return F.ctc_loss(frames, torch.tensor([[1, 2, 3, 4, 5]]), *lengths, zero_infinity=zero_infinity)


class Tried(NamedTuple):
    """One program, and what it becomes when the advice is followed.

    Attributes:
        op: operation that is named.
        run: what fails.
        advised: words that the advice must have.
        changed: what it becomes.
    """

    op: str
    run: Callable[[Tensor], Tensor]
    advised: str
    changed: Callable[[Tensor], Tensor]


TRIED = [
    Tried("log", lambda h: some_zero(h).abs().log(), "p.clamp_min(1e-8)", lambda h: some_zero(h).abs().clamp_min(1e-8).log()),
    Tried("log1p", lambda h: torch.log1p(some_zero(h).abs() - 1.0 * ZERO), "x.clamp_min(-1 + 1e-6)",
          lambda h: torch.log1p((some_zero(h).abs() - 1.0 * ZERO).clamp_min(-1 + 1e-6))),
    Tried("sqrt", torch.sqrt, "x.clamp_min(0) + 1e-12", lambda h: torch.sqrt(h.clamp_min(0) + 1e-12)),
    Tried("sqrt", lambda h: some_zero(h).abs().sqrt(), "torch.sqrt(x + 1e-12)",
          lambda h: torch.sqrt(some_zero(h).abs() + 1e-12)),
    Tried("rsqrt", lambda h: torch.rsqrt(some_zero(h)), "x.clamp_min(1e-6)",
          lambda h: torch.rsqrt(some_zero(h).clamp_min(1e-6))),
    Tried("div", lambda h: h / (h * 0).sum(), "y.clamp_min(1e-8)", lambda h: h / (h * 0).sum().clamp_min(1e-8)),
    Tried("div", lambda h: some_zero(h) / some_zero(h).norm(dim=1, keepdim=True), "y.clamp_min(1e-8)",
          lambda h: some_zero(h) / some_zero(h).norm(dim=1, keepdim=True).clamp_min(1e-8)),
    Tried("reciprocal", lambda h: 1 / some_zero(h).abs(), "1 / x.clamp_min(1e-8)",
          lambda h: 1 / some_zero(h).abs().clamp_min(1e-8)),
    Tried("pow", lambda h: some_zero(h).abs() ** -3, "x.clamp_min(1e-4) ** e",
          lambda h: some_zero(h).abs().clamp_min(1e-4) ** -3),
    Tried("pow", lambda h: some_zero(h).abs() ** 0.5, "x.clamp_min(1e-8) ** e",
          lambda h: some_zero(h).abs().clamp_min(1e-8) ** 0.5),
    Tried("exp", lambda h: torch.exp(h * 1e4), "torch.exp(x.clamp_max(20))", lambda h: torch.exp((h * 1e4).clamp_max(20))),
    Tried("expm1", lambda h: torch.expm1(h * 1e4), "torch.expm1(x.clamp_max(20))",
          lambda h: torch.expm1((h * 1e4).clamp_max(20))),
    Tried("cosh", lambda h: torch.cosh(h * 1e4), "x.clamp(-20, 20)", lambda h: torch.cosh((h * 1e4).clamp(-20, 20))),
    Tried("sinh", lambda h: torch.sinh(h * 1e4), "x.clamp(-20, 20)", lambda h: torch.sinh((h * 1e4).clamp(-20, 20))),
    Tried("acos", lambda h: torch.acos(h * 9), "x.clamp(-1 + 1e-6, 1 - 1e-6)",
          lambda h: torch.acos((h * 9).clamp(-1 + 1e-6, 1 - 1e-6))),
    Tried("asin", lambda h: torch.asin(h * 0 + 1), "x.clamp(-1 + 1e-6, 1 - 1e-6)",
          lambda h: torch.asin((h * 0 + 1).clamp(-1 + 1e-6, 1 - 1e-6))),
    Tried("acosh", lambda h: torch.acosh(some_zero(h)), "x.clamp_min(1 + 1e-6)",
          lambda h: torch.acosh(some_zero(h).clamp_min(1 + 1e-6))),
    Tried("atanh", lambda h: torch.atanh(h * 0 + 1), "x.clamp(-1 + 1e-6, 1 - 1e-6)",
          lambda h: torch.atanh((h * 0 + 1).clamp(-1 + 1e-6, 1 - 1e-6))),
    Tried("erfinv", lambda h: torch.erfinv(h * 0 + 1), "x.clamp(-1 + 1e-6, 1 - 1e-6)",
          lambda h: torch.erfinv((h * 0 + 1).clamp(-1 + 1e-6, 1 - 1e-6))),
    Tried("logit", lambda h: torch.logit(h * 0 + 1), "torch.logit(p, eps=1e-6)", lambda h: torch.logit(h * 0 + 1, eps=1e-6)),
    Tried("softmax", lambda h: masked(h).softmax(1), "keep one position", lambda h: one_kept(h).softmax(1)),
    Tried("softmax", lambda h: masked(h).softmax(1), "torch.finfo(x.dtype).min", lambda h: masked(h, SMALLEST).softmax(1)),
    Tried("logsumexp", lambda h: masked(h).logsumexp(1), "keep one position", lambda h: one_kept(h).logsumexp(1)),
    Tried("mean", lambda h: h[h > 1e9].mean(), "count.clamp_min(1)", lambda h: h[h > 1e9].sum() / (h > 1e9).sum().clamp_min(1)),
    Tried("nll_loss", lambda h: F.cross_entropy(h, LABELS), "count.clamp_min(1)",
          lambda h: F.cross_entropy(h, LABELS, reduction="sum") / (LABELS != -100).sum().clamp_min(1)),
    Tried("std", lambda h: h[:, :1].std(1), "correction=0", lambda h: h[:, :1].std(1, correction=0)),
    Tried("var", lambda h: h[:, :1].var(1), "correction=0", lambda h: h[:, :1].var(1, correction=0)),
    Tried("ctc_loss", ctc, "zero_infinity=True", lambda h: ctc(h, zero_infinity=True)),
    Tried("layer_norm", lambda h: F.layer_norm(some_zero(h).half(), (WIDTH,), eps=0.0).float(), "in float32 with eps=1e-5",
          lambda h: F.layer_norm(some_zero(h), (WIDTH,), eps=1e-5)),
    Tried("hypot", lambda h: torch.hypot(some_zero(h), some_zero(h)), "torch.sqrt(x * x + y * y + 1e-12)",
          lambda h: torch.sqrt(some_zero(h) ** 2 + some_zero(h) ** 2 + 1e-12)),
    Tried("log", lambda h: torch.where(~ZERO, some_zero(h).abs().log(), h), "torch.where(ok, f(torch.where(ok, x, 1)), 0)",
          lambda h: torch.where(~ZERO, torch.where(~ZERO, h.abs(), 1).log(), 0)),
    Tried("eigh",
          lambda h: torch.linalg.eigh(torch.eye(WIDTH) * h.mean())[1], "a small multiple of a diagonal of distinct numbers",
          lambda h: torch.linalg.eigh(torch.eye(WIDTH) * h.mean() + EIGEN)[1]),
    Tried("mm", lambda h: ((h * 1e4).half() @ torch.full((WIDTH, WIDTH), 200.0).half()).float(), "use bfloat16",
          lambda h: ((h * 1e4).bfloat16() @ torch.full((WIDTH, WIDTH), 200.0).bfloat16()).float()),
    Tried("mm", lambda h: ((h * 1e30).bfloat16() @ torch.full((WIDTH, WIDTH), 1e30).bfloat16()).float(),
          "The inputs are too large", lambda h: (h.bfloat16() @ torch.full((WIDTH, WIDTH), 1.0).bfloat16()).float()),
    Tried("addcmul", lambda h: torch.addcmul(h, h, h, value=torch.nan), "a factor or a summand on this line that is NaN",
          lambda h: torch.addcmul(h, h, h, value=1.0)),
    Tried("mul", lambda h: h * float("nan"), "where this number is made", lambda h: h * 1.0),
    Tried("mul", lambda h: h + ZERO * -torch.inf, "x.masked_fill(mask, -torch.inf)",
          lambda h: h.masked_fill(ZERO & (torch.arange(WIDTH) > 0), -torch.inf).softmax(1)),
    Tried("div", lambda h: h.sum() / len(h[h > 1e9].tolist()), "x / max(n, 1)",
          lambda h: h.sum() / max(len(h[h > 1e9].tolist()), 1)),
    Tried("softmax", lambda h: masked(h, torch.inf).softmax(1), "x.masked_fill(mask, -torch.inf)",
          lambda h: one_kept(h).softmax(1)),
    Tried("nll_loss", lambda h: F.cross_entropy(h, LABELS.clamp(0), WEIGHTS), "weights.sum().clamp_min(1e-8)",
          lambda h: F.cross_entropy(h, LABELS.clamp(0), WEIGHTS, reduction="sum") / WEIGHTS[:1].sum().clamp_min(1e-8)),
    Tried("exp", lambda h: torch.exp((h * 1e3).half()).float(), "torch.exp(x.clamp_max(10))",
          lambda h: torch.exp((h * 1e3).half().clamp_max(10)).float()),
    Tried("pow", lambda h: (h.relu() * 1e20) ** 3, "The inputs are too large", lambda h: h.relu() ** 3),
    Tried("var", lambda h: (h * 1e30).var(1), "The inputs are too large", lambda h: h.var(1)),
    Tried("mean", lambda h: (h * 0 + 3e38).mean(), "The inputs are too large", lambda h: (h * 0 + 3.0).mean()),
    Tried("weight_norm", lambda h: torch._weight_norm(h * 0, torch.ones(ROWS, 1), 0), "small random numbers",
          lambda h: torch._weight_norm(h, torch.ones(ROWS, 1), 0)),
    Tried("to_copy", lambda h: (h + 1e6).half().float(), "stay in float32", lambda h: h + 1e6),
]  # fmt: skip


def found_in(run: Callable[[Tensor], Tensor]) -> gradwatch.Origin | None:
    """Return what is found in one step of a model with this operation; None if everything is finite."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    found = None
    try:
        with gradwatch.find_nonfinite(model):
            run(model(torch.randn(ROWS, WIDTH))).pow(2).mean().backward()
    except gradwatch.NonFiniteError as error:
        found = error.origin or str(error)
    assert not isinstance(found, str), found  # it has several origins
    return found


@pytest.mark.parametrize("tried", TRIED, ids=lambda tried: f"{tried.op}, {tried.advised}")
def test_advice_that_is_followed_makes_the_program_finite(tried: Tried) -> None:
    """The loss, the gradients and the weights."""
    found = found_in(tried.run)
    assert found is not None
    assert found.op == tried.op
    assert any(tried.advised in line for line in found.advice), found.advice
    assert found_in(tried.changed) is None


def test_in_float16_the_advice_says_that_its_constants_need_float32() -> None:
    """1e-8 is zero there."""
    found = found_in(lambda h: some_zero(h).half().abs().log().float())
    assert found is not None
    assert found.advice[0].endswith("Do it in float32: narrower numbers round such constants away.")


SAID: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a power that overflows beside zeros": (lambda h: (h.relu() * 1e20) ** 3, "got float32 numbers up to"),
    "a power of a number": (lambda h: 2.0 ** (h.relu() * 1e4), "got float32 numbers up to"),
    "a power of negative numbers": (lambda h: (h.clamp_max(0)) ** 1.5, "got numbers down to"),
    "a negative power of zero": (lambda h: h.relu() ** -1.0, "zeros of 48"),
    "a tensor as an exponent": (lambda h: h.relu() ** torch.tensor(-1.0), "zeros of 48"),
    "a logarithm at -1 beside zeros": (
        lambda h: torch.log1p(h.relu() - 2.0 * ZERO * (h > 0)),
        "got numbers down to -1.84",
    ),
    "of a product with a logarithm, the other factor": (
        lambda h: torch.xlogy(h.relu(), h - h.detach() - 1),
        "down to -1",
    ),
    "an inverse root of negative numbers": (torch.rsqrt, "got numbers down to"),
    "a variance that overflows": (lambda h: (h * 1e30).var(1), "got float32 numbers up to"),
    "a variance of one": (lambda h: h[:, :1].var(1), "got too few elements"),
    "infinity without a minus": (lambda h: masked(h, torch.inf).softmax(1), "got +inf"),
    "a masked row": (lambda h: masked(h).softmax(1), "got a row of -inf"),
    "0 times infinity": (lambda h: h.relu() * -torch.inf, "to multiply by minus infinity"),
    "a division by a number": (lambda h: h.relu() / 0.0, "got 0 to divide by"),
    "a summand": (lambda h: h - torch.nan, "got NaN to subtract"),
    "the gamma function of zero": (lambda h: torch.lgamma(h.clamp(0, 1)), "zeros of 48"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_happened_is_said_by_what_made_the_result(name: str) -> None:
    """And not by other numbers that the operation got, such as zeros in what overflows."""
    run, words = SAID[name]
    found = found_in(run)
    assert found is not None
    assert words in found.cause
