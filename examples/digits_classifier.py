"""Train a classifier on scikit-learn's digits: a healthy run without an incident, and a learning rate that is too high.

Run it with ``python examples/digits_classifier.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

HEALTHY_RATE, WRECKING_RATE = 0.1, 3.0


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images between 0 and 1, shape (1797, 64), and labels, shape (1797,)."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def train(
    rate: float, clip: gradwatch.AutoClip | str | None = None, seed: int = 0, epochs: int = 10
) -> tuple[float, gradwatch.Monitor]:
    """Train a small classifier; return its accuracy on held-out digits, and the monitor."""
    torch.manual_seed(seed)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    with gradwatch.attach(model, clip=clip, report=None) as monitor:
        for _ in range(epochs):
            for batch in torch.randperm(1500).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean().item()
    return accuracy, monitor


def main() -> None:
    """Train four times and print the accuracy and the summary of each run."""
    variants: list[tuple[str, float, gradwatch.AutoClip | str | None]] = [
        ("healthy", HEALTHY_RATE, None),
        ("wrecked", WRECKING_RATE, None),
        ("wrecked, auto-clip by norm", WRECKING_RATE, "norm"),  # starts at a norm of 1.0 and lowers it to 0.25
        ("wrecked, auto-clip to norm 0.05", WRECKING_RATE, gradwatch.AutoClip(gradwatch.ClipNorm(0.05))),
    ]
    for name, rate, clip in variants:
        accuracy, monitor = train(rate, clip)
        print(f"{name}: rate {rate}, accuracy {accuracy:.3f}")
        print(monitor.summary(), end="\n\n")


if __name__ == "__main__":
    main()
