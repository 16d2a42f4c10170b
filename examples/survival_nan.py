"""A survival model whose loss is finite when its gradient becomes NaN: `python examples/survival_nan.py`.

The loss uses the logarithm of only some rows. In a row that it drops, the probability reaches 0, and the derivative of the
logarithm there is infinite: its product with a gradient of zero is NaN, in all weights. gradwatch names the line, and leaves the
step out.
"""

import torch
from torch import Tensor, nn

import gradwatch


class Survival(nn.Module):
    """The logarithm of the probability to survive, shape (batch, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.hazard = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return it for a batch of shape (batch, 16)."""
        return torch.log(1 - torch.sigmoid(self.hazard(self.body(x))))


def main() -> None:
    """Train for 80 steps."""
    torch.manual_seed(0)
    model = Survival()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    # steps as short as these are not kept by default, because that would be felt
    gradwatch.attach(model, clip="norm", report="log", forensics=True)
    for _ in range(80):
        x = torch.randn(64, 16)
        log_survival, alive = model(x), x[:, 0] > 0
        loss = log_survival[~alive].exp().mean() - log_survival[alive].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
