"""The regression case: a small network on unscaled targets, whose training overflows within eight steps.

Data: scikit-learn's `make_regression`, 500 rows to train and 500 to test. Model: 20-25-1, ReLU, He-uniform. Mean squared
error, SGD with rate 0.01 and momentum 0.9, batches of 32. Source: Brownlee, "How to avoid exploding gradients with
gradient clipping" (2019), whose published train/test errors with clipping always on are 5.08/27.4 (norm 1.0) and
9.49/9.99 (value 5.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

import gradwatch
from gradwatch.errors import UsageError
from gradwatch.text.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table
    from torch import Tensor

EPOCHS = 100
PUBLISHED = {"always norm 1.0, published": (5.08, 27.4), "always value 5.0, published": (9.49, 9.99)}


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train x (500, 20) and y (500, 1), then test x and y, unscaled.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import make_regression
    except ImportError:
        raise UsageError(missing("The demo", "scikit-learn", "demo")) from None
    x, y = make_regression(n_samples=1000, n_features=20, noise=0.1, random_state=1)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    return x[:500], y[:500], x[500:], y[500:]


def network() -> nn.Sequential:
    """Return the model, initialised after He (uniform)."""
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(20, 25))
    model.add_module("relu", nn.ReLU())
    model.add_module("output", nn.Linear(25, 1))
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


@dataclass(frozen=True)
class Result:
    """The result of one training: mean squared errors at its end, and the loss of each step."""

    train_error: float
    test_error: float
    losses: list[float]

    @property
    def nonfinite_step(self) -> int | None:
        """The first step whose loss was NaN or infinite; None if there is none."""
        return next((step for step, loss in enumerate(self.losses) if not math.isfinite(loss)), None)


def train(
    model: nn.Module, epochs: int = EPOCHS, seed: int = 0, before_step: Callable[[int], None] | None = None
) -> Result:
    """Train with plain PyTorch, without any call to gradwatch."""
    x, y, test_x, test_y = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    shuffle = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=shuffle).split(32):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[batch]), y[batch])
            loss.backward()
            if before_step is not None:
                before_step(len(losses))
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        train_error = nn.functional.mse_loss(model(x), y).item()
        test_error = nn.functional.mse_loss(model(test_x), test_y).item()
    return Result(train_error, test_error, losses)


def run(*, report: str | None = "auto", seed: int = 0, epochs: int = EPOCHS) -> Table:
    """Train twice, watched only and with auto-clip, and return a table of both results."""
    from rich.table import Table

    table = Table(title="The same training, twice", title_justify="left", caption_justify="left")
    for heading in ("", "loss not finite", "incident", "train", "test"):
        table.add_column(heading)
    for name, clip in (("watched only", None), ('clip="norm"', "norm")):
        torch.manual_seed(seed)
        model = network()
        with gradwatch.attach(model, clip=clip, report=report) as monitor:
            result = train(model, epochs, seed)
        first = next(iter(monitor.incidents), None)
        lost = "never" if result.nonfinite_step is None else f"at step {result.nonfinite_step}"
        opened = "none" if first is None else f"{first.kind}, opened at step {first.opened_step}"
        table.add_row(name, lost, opened, f"{result.train_error:.4g}", f"{result.test_error:.4g}")
        if first is not None and first.clip is not None:
            table.caption = f"Auto-clip: {first.clip}."
    for name, errors in PUBLISHED.items():
        table.add_row(name, "never", "", *map(str, errors))
    return table
