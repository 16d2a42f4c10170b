"""Train on the adding problem over 100 steps: a vanilla RNN that explodes, the same with clipping by norm, and an LSTM.

Each sequence holds 100 random numbers, two of which are marked; the target is the sum of these two. Source: Hochreiter &
Schmidhuber, "Long short-term memory" (1997). The thresholds 5 and 10 are those of tutorials on word-level language models.
Run it with ``python examples/rnn_long_sequence.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradwatch

LENGTH = 100


class Adder(nn.Module):
    """A recurrent layer and a linear output. ``cell`` is ``"rnn"`` (ReLU) or ``"lstm"``."""

    def __init__(self, cell: str, width: int = 32) -> None:
        super().__init__()
        self.recurrent: nn.RNN | nn.LSTM
        if cell == "lstm":
            self.recurrent = nn.LSTM(2, width, batch_first=True)
        else:
            self.recurrent = nn.RNN(2, width, batch_first=True, nonlinearity="relu")
            # slightly more than the identity: the state and its gradient grow with each step
            with torch.no_grad():
                self.recurrent.get_parameter("weight_hh_l0").copy_(1.03 * torch.eye(width))
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the predicted sums, shape (n, 1), for sequences ``x`` of shape (n, LENGTH, 2)."""
        states: Tensor = self.recurrent(x)[0]
        result: Tensor = self.output(states[:, -1])
        return result


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences of shape (size, LENGTH, 2) and targets of shape (size, 1)."""
    values = torch.rand(size, LENGTH, generator=generator)
    marks = torch.zeros(size, LENGTH)
    half = LENGTH // 2
    rows = torch.arange(size)
    marks[rows, torch.randint(half, (size,), generator=generator)] = 1
    marks[rows, half + torch.randint(half, (size,), generator=generator)] = 1
    return torch.stack([values, marks], dim=2), (values * marks).sum(1, keepdim=True)


@dataclass(frozen=True)
class Result:
    """The result of a training."""

    losses: list[float]
    monitor: gradwatch.Monitor

    @property
    def finite(self) -> bool:
        """True if no loss was NaN or infinite."""
        return all(map(math.isfinite, self.losses))


def train(cell: str = "rnn", clip: gradwatch.AutoClip | str | None = None, steps: int = 100, seed: int = 0) -> Result:
    """Train with SGD on new sequences at each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Adder(cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    with gradwatch.attach(model, clip=clip, report=None) as monitor:
        for _ in range(steps):
            x, y = batch(32, generator)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return Result(losses, monitor)


def main() -> None:
    """Train each variant and print its first and last losses and its incidents."""
    variants: list[tuple[str, str, gradwatch.AutoClip | str | None]] = [
        ("RNN, watched only", "rnn", None),
        ("RNN, auto-clip by norm", "rnn", "norm"),
        ("RNN, auto-clip norm 5", "rnn", gradwatch.AutoClip(gradwatch.ClipNorm(5.0))),
        ("RNN, auto-clip norm 10", "rnn", gradwatch.AutoClip(gradwatch.ClipNorm(10.0))),
        ("LSTM, watched only", "lstm", None),
        ("LSTM, auto-clip norm 5", "lstm", gradwatch.AutoClip(gradwatch.ClipNorm(5.0))),
        ("LSTM, auto-clip norm 10", "lstm", gradwatch.AutoClip(gradwatch.ClipNorm(10.0))),
    ]
    for name, cell, clip in variants:
        result = train(cell, clip)
        last = sum(result.losses[-20:]) / 20
        print(f"{name:26} loss {result.losses[0]:.3g} -> {last:.3g}; {result.monitor.incidents or 'no incident'}")


if __name__ == "__main__":
    main()
