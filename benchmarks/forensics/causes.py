"""Operations that make a number that is not finite, each with what a tool should say of it; and some that only look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 16, 6
LATE = torch.arange(WIDTH) > 2  # the other columns are put to zero
LARGE = torch.full((WIDTH, WIDTH), 200.0)
SOME = (torch.arange(ROWS) == 5) | (torch.arange(ROWS) == 11)  # rows of the batch that are put to zero


class Cause(NamedTuple):
    """One operation that fails.

    Attributes:
        op: its name, as gradwatch should say it.
        direction: forward or backward.
        run: the operation, in one line; of activations of shape (16, 6), with some elements zero.
        rows: rows that are not finite; empty if all are, or if that cannot be said.
        inside: function in which the operation is written; None: in ``run`` itself.
    """

    op: str
    direction: str
    run: Callable[[Tensor], Tensor]
    rows: tuple[int, ...] = ()
    inside: Callable[..., object] | None = None

    @property
    def lines(self) -> range:
        """The lines on which the operation is written."""
        code = (self.inside or self.run).__code__
        return range(code.co_firstlineno, max(line for _, _, line in code.co_lines() if line is not None) + 1)


def _at_zero(h: Tensor) -> Tensor:
    """Put rows 5 and 11 to zero."""
    return h * ~SOME[:, None]


def _masked(h: Tensor) -> Tensor:
    return h.masked_fill(SOME[:, None] | ~LATE, -torch.inf)


def _aligned(h: Tensor) -> Tensor:
    """Return the loss of five labels in two frames."""
    frames = h.log_softmax(1)[:2, None]
    return nn.functional.ctc_loss(frames, torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([2]), torch.tensor([5]))


def _vectors(h: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(torch.eye(WIDTH) * h.mean())[1]
    return vectors


def _normalised(h: Tensor) -> Tensor:
    return nn.functional.layer_norm(h.half(), (WIDTH,), eps=0.0).float()


def _counted(h: Tensor) -> Tensor:
    """Return a product of integers that is beyond their range, and so negative."""
    return torch.full(h.shape, 2**62) * 2


class Doubled(torch.autograd.Function):
    """A function written in Python whose backward divides by zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, h: Tensor) -> Tensor:
        """Double it."""
        ctx.save_for_backward(h)
        return 2 * h

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Divide by the input, which is wrong."""
        (h,) = ctx.saved_tensors  # type: ignore[attr-defined]
        quotient: Tensor = gradient / h
        return quotient


def doubled(h: Tensor) -> Tensor:
    """Run the function."""
    result: Tensor = Doubled.apply(h)  # type: ignore[no-untyped-call]
    return result


CAUSES: dict[str, Cause] = {
    "log of zero": Cause("log", "forward", lambda h: torch.log(_at_zero(h).abs()), (5, 11)),
    "sqrt at zero": Cause("sqrt", "backward", lambda h: torch.sqrt(_at_zero(h).abs()), (5, 11)),
    "mean over an empty mask": Cause("div", "forward", lambda h: (h * LATE).sum() / (h * 0).sum() + h),
    "softmax of a masked row": Cause("softmax", "forward", lambda h: torch.softmax(_masked(h), 1), (5, 11)),
    "exp overflows": Cause("exp", "forward", lambda h: torch.exp(h * SOME[:, None] * 1e4), (5, 11)),
    "float16 product": Cause("mm", "forward", lambda h: ((h * 1e4).half() @ LARGE.half()).float()),
    "where over a singular branch": Cause(
        "log", "backward", lambda h: torch.where(~SOME[:, None] & (h != 0), torch.log(_at_zero(h).abs()), h), (5, 11)
    ),
    "hypot at zero": Cause("hypot", "backward", lambda h: torch.hypot(_at_zero(h), _at_zero(h)), (5, 11)),
    "negative power of zero": Cause("pow", "forward", lambda h: _at_zero(h).abs() ** -1.5, (5, 11)),
    "root as a power": Cause("pow", "backward", lambda h: _at_zero(h).abs() ** 0.5, (5, 11)),
    "acos beyond 1": Cause("acos", "forward", lambda h: torch.acos(h * SOME[:, None] + 3 * SOME[:, None]), (5, 11)),
    "std of one element": Cause("std", "forward", lambda h: h[:, :1].std(1, keepdim=True) + h),
    "normalisation at zero": Cause("div", "forward", lambda h: _at_zero(h) / _at_zero(h).norm(dim=1, keepdim=True), (5, 11)),
    "logit of 1": Cause("logit", "forward", lambda h: torch.logit((h * 0 + SOME[:, None]).clamp(0.5, 1)), (5, 11)),
    "function of its own": Cause("div", "backward", lambda h: doubled(_at_zero(h)), (5, 11), Doubled.backward),
    "narrowed to float16": Cause("to_copy", "forward", lambda h: (h + 1e6 * SOME[:, None]).half().float(), (5, 11)),
    "reciprocal square root of zero": Cause("rsqrt", "forward", lambda h: torch.rsqrt(_at_zero(h).abs()), (5, 11)),
    "log1p of -1": Cause("log1p", "forward", lambda h: torch.log1p(_at_zero(h).abs() - 1.0 * SOME[:, None]), (5, 11)),
    "labels that do not fit": Cause("ctc_loss", "forward", lambda h: _aligned(h) + h, (), _aligned),
    "eigenvectors of equal eigenvalues": Cause("eigh", "backward", lambda h: _vectors(h)[0] + h, (), _vectors),
    "layer normalisation of constants": Cause("layer_norm", "forward", lambda h: _normalised(_at_zero(h)), (5, 11), _normalised),
    "integer overflow": Cause("sqrt", "forward", lambda h: torch.sqrt(_counted(h).float()) + h),
    "deviation of an encoder": Cause("exp", "forward", lambda h: h + torch.exp(h * 0 + 99.0 * SOME[:, None]), (5, 11)),
    "gamma function of zero": Cause("lgamma", "forward", lambda h: torch.lgamma(_at_zero(h)), (5, 11)),
    "logsumexp of a masked row": Cause("logsumexp", "forward", lambda h: torch.logsumexp(_masked(h), 1)[:, None] + h, (5, 11)),
    "product of many": Cause("prod", "forward", lambda h: torch.prod(h * 0 + 1e9, 1)[:, None] + h),
}  # fmt: skip
# a product that overflows only where a policy has made its inputs float16
NARROW = Cause("mm", "forward", lambda h: ((h * 1e4) @ LARGE.to(h.dtype)) * 1e-7)
HEALTHY: dict[str, Callable[[Tensor], Tensor]] = {
    "a partial mask": lambda h: torch.softmax(h.masked_fill(~LATE, -torch.inf), 1),
    "a causal mask": lambda h: torch.softmax(h[:, :, None] + torch.full((6, 6), -torch.inf).triu(1), 2).sum(2),
    "a branch that where drops": lambda h: torch.where(SOME[:, None], h, torch.log(_at_zero(h).detach().abs())),
    "a branch that is clamped": lambda h: torch.log(_at_zero(h).detach().abs()).clamp(-9, 9) * h,
    "attention": lambda h: nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0],
}  # fmt: skip


class Block(nn.Module):
    """A layer and then one function."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.run(self.linear(x))
        return result


class Net(nn.Module):
    """Three blocks, of which the second fails."""

    def __init__(self, run: Callable[[Tensor], Tensor], *others: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(torch.tanh), Block(run), *others)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.head(self.blocks(x))
        return result


MODULE = "blocks.1"
