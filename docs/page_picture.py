"""Draw docs/report.png, the report page of a real training: ``python docs/page_picture.py`` (needs Chromium, chromedriver).

The model has eight residual blocks. From step 1500 on, the learning rate is fifty times as high for 40 steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradwatch
from gradwatch.__main__ import main
from tests.browser import page


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output, shape (n, width), for an input ``x`` of the same shape."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


def train(folder: Path) -> None:
    """Train with auto-clip and a run log."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 32), *(Block() for _ in range(8)), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x = torch.randn(512, 8)
    y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2]
    with gradwatch.attach(model, clip="norm", report=None, log=folder):
        for step in range(3000):
            optimizer.param_groups[0]["lr"] = 1.0 if 1500 <= step < 1540 else 0.02
            batch = torch.randint(512, (32,))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
            optimizer.step()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run, written = Path(folder) / "runs" / "today", Path(folder) / "page.html"
        train(run)
        main(["report", str(run), "--html", str(written)])
        text = written.read_text(encoding="utf-8").replace(f"{folder}/", "")
        written.write_text(text, encoding="utf-8")
        with page(written, width=1240, height=1180) as driver:
            driver.save_screenshot(str(Path(__file__).parent / "report.png"))
