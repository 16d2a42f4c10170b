"""The band within which a row is ordinary, so that it need not be judged by the rules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.history.columns import widened

if TYPE_CHECKING:
    from gradwatch.history.history import History
    from gradwatch.records import Floats, Row


class Band:
    """Upper limits of the loss and of the gradient norms of ordinary rows; infinite until the first row was judged.

    Args:
        layers: number of layers.
        times: least multiple of a layer's typical norm that is not ordinary (`VerdictSettings.band`).

    Attributes:
        grad_norm: the largest ordinary norms, shape (L,).
        loss: the largest ordinary loss.
    """

    def __init__(self, layers: int, times: float) -> None:
        self._times = times
        self.grad_norm: Floats = np.full(layers, np.inf)
        self.loss = math.inf

    def grow(self, layers: int) -> None:
        """Add layers, whose gradients are out of the ordinary until a typical norm is known."""
        self.grad_norm = widened(self.grad_norm, layers, 0.0)

    def follow(self, history: History) -> None:
        """Set the limits from the history, whose last row was judged."""
        typical = history.typical_grad
        limit = typical.value * np.maximum(self._times, np.exp(4 * typical.scatter))
        # a layer without a typical norm yet is out of the ordinary whenever it has a gradient
        self.grad_norm = np.nan_to_num(limit, nan=0.0, posinf=np.inf)
        if history.row.has_loss:
            middle, spread = history.loss_level()
            self.loss = middle + 3 * max(spread, abs(middle) / 10)

    def is_left_by(self, row: Row) -> bool:
        """Return whether a row is out of the ordinary, so that the weights should be sampled before they change again."""
        return (
            row.nonfinite is not None
            or (row.has_loss and not row.loss <= self.loss)
            or bool((row.grad_norm > self.grad_norm).any())
        )
