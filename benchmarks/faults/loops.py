"""The training loop, and what it asks for the loss of the next batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from torch.optim import Optimizer

    from benchmarks.faults.data import Data
    from benchmarks.faults.program import Run

Criterion = Callable[[Tensor, Tensor], Tensor]


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Callable[[], Tensor],
    *,
    rate: Callable[[int], float] | None = None,
    schedule: lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    begin: Callable[[int], None] | None = None,
    tamper: Callable[[int], None] | None = None,
) -> NoReturn:
    """Watch the model and train it until the run says that it is done.

    Args:
        run: the run.
        model: what is watched and trained.
        optimizer: its optimizer.
        objective: returns the loss of the next batch.
        rate: returns the learning rate of a step.
        schedule: is stepped after each step.
        clip: the largest norm of the gradient.
        begin: is called with the step before its forward pass.
        tamper: is called with the step after its backward pass.
    """
    run.watch(model)
    while True:
        step = run.made
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        if begin is not None:
            begin(step)
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        if tamper is not None:
            tamper(step)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        run.step(loss)


def to_zero(optimizer: Optimizer, run: Run) -> lr_scheduler.LRScheduler:
    """The rate goes down in a line to nothing at the end of the run."""
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / run.steps)


def train_before(optimizer: Optimizer, objective: Callable[[], Tensor], steps: int) -> None:
    """Train without being watched: what happened before the run was resumed, or elsewhere."""
    for _ in range(steps):
        optimizer.zero_grad()
        objective().backward()
        optimizer.step()
    optimizer.zero_grad()


def batches(size: int | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches drawn with replacement, without end; all rows each time for a size of None."""
    rows = len(tensors[0])
    while True:
        chosen = torch.arange(rows) if size is None else torch.randint(rows, (size,))
        yield tuple(tensor[chosen] for tensor in tensors)


def windows(size: int, length: int, tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of ``(size, length)`` tokens, and the same one place later."""
    places = torch.arange(length)
    while True:
        start = torch.randint(len(tokens) - length - 1, (size, 1))
        yield tokens[start + places], tokens[start + places + 1]


def over(batches: Iterator[tuple[Tensor, ...]], loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The loss of the next batch, each time it is asked for."""
    return lambda: loss(*next(batches))


def batch_loss(
    model: nn.Module, data: Data, criterion: Criterion = functional.mse_loss, size: int | None = 32
) -> Callable[[], Tensor]:
    """What a criterion says of the model's answers on the next batch, each time it is asked for."""
    return over(batches(size, *data), lambda x, y: criterion(model(x), y))


def letters_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy over all places that have an answer."""
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())
