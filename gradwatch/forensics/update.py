"""The optimizer's arithmetic: weights that are not finite although the gradients of their update were."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.forensics.operands import is_nonfinite, operand_of
from gradwatch.records import Operand, Origin
from gradwatch.text.wording import number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.optim import Optimizer

_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta")


def update_origin(optimizer: Optimizer, step: int) -> Origin | None:
    """Return what is known of an update that has damaged weights; None if nothing in its arithmetic shows that it did."""
    damaged = [
        (group, one)
        for group in optimizer.param_groups
        for one in group["params"]
        if not one.is_sparse and is_nonfinite(one)
    ]
    if not damaged:
        return None
    group, weight = damaged[0]
    name, rate, eps = type(optimizer).__name__, float(group.get("lr", math.nan)), group.get("eps")
    told = [f"{name} with rate {number(rate)}"]
    if isinstance(eps, float):
        own = torch.tensor(eps, dtype=weight.dtype, device="cpu").item()
        kind = str(weight.dtype).removeprefix("torch.")
        told.append(
            f"eps {number(eps)}"
            + (f", which is {number(own)} in {kind}" if own != eps and abs(own - eps) > eps / 100 else "")
        )
    operands = list(_state_of(optimizer, weight))
    if not _shows(operands, weight, eps, rate):
        return None
    smallest = min(
        (one.smallest for name, one in operands if name in _SECOND and not math.isnan(one.smallest)), default=math.nan
    )
    if not math.isnan(smallest):
        told.append(f"smallest second moment {number(smallest)}")
    return Origin(
        subject="optimizer",
        op="step",
        direction="update",
        part="optimizer",
        name=name,
        inputs=tuple(one for _, one in operands)[:4],
        output=operand_of("weight", weight),
        cause=f"the gradients were finite and the weights after the step are not: {', '.join(told)}",
        advice=tuple(_advice(weight, eps, rate)),
        found_by="optimizer state",
        step=step,
    )


def _shows(operands: list[tuple[str, Operand]], weight: Tensor, eps: Any, rate: float) -> bool:
    """Return whether the state explains the damage: it is not finite, it divides by zero, or the rate is beyond its dtype."""
    vanishes = isinstance(eps, float) and torch.tensor(eps, dtype=weight.dtype, device="cpu").item() == 0
    zero = any(name in _SECOND and one.zeros for name, one in operands)
    broken = any(one.nans or one.infs for _, one in operands)
    return broken or (vanishes and zero) or not math.isfinite(rate) or rate > 1e-3 * torch.finfo(weight.dtype).max


def _state_of(optimizer: Optimizer, weight: Tensor) -> Iterator[tuple[str, Operand]]:
    state: dict[str, Any] = optimizer.state.get(weight, {})
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            yield name, operand_of(name, value)


def _advice(weight: Tensor, eps: Any, rate: float) -> Iterator[str]:
    kind = str(weight.dtype).removeprefix("torch.")
    if isinstance(eps, float) and torch.tensor(eps, dtype=weight.dtype, device="cpu").item() == 0:
        least = 1e-4 if weight.dtype is torch.float16 else 1e-8
        yield f"eps is 0 in {kind}, so that 0 / 0 is NaN where a gradient is always 0: use eps={least:.0e}, or float32 weights."
    elif weight.dtype in (torch.float16, torch.bfloat16):
        yield f"Keep the weights in float32: the state of the optimizer does not fit into {kind}."
    if rate > 1:
        yield f"The rate is {number(rate)}: lower it."
    yield "Go back to a checkpoint with finite weights and a finite state of the optimizer."
