"""Draw docs/live.svg, the picture of the live view in the README, from a real run of the regression.

Run it with ``python docs/picture.py``.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

import gradwatch
from gradwatch.commands.demo_training import network, train
from gradwatch.reports.view import View


class Keep(gradwatch.Report):
    """Stores the last snapshot. It receives snapshots as often as the live report does."""

    period = 0.2

    def __init__(self) -> None:
        self.kept: gradwatch.Snapshot | None = None

    def step(self, snapshot: gradwatch.Snapshot) -> None:
        """Store the snapshot."""
        self.kept = snapshot

    def close(self, snapshot: gradwatch.Snapshot) -> None:
        """Do nothing; no report is shown at the end."""


def main() -> None:
    """Train with auto-clip and draw the last snapshot, 84 columns wide."""
    torch.manual_seed(0)
    model, report = network(), Keep()
    with gradwatch.attach(model, clip="norm", report=report):
        train(model, epochs=30)
    assert report.kept is not None
    console = Console(record=True, width=84, height=24, file=io.StringIO(), force_terminal=True)
    console.print(View(report.kept))
    path = Path(__file__).parent / "live.svg"
    path.write_text(console.export_svg(title="gradwatch"))
    print(path.name)


if __name__ == "__main__":
    main()
