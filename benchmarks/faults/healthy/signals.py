"""Healthy trainings on waves and speech-like frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faults.loops import batches, fit, over
from benchmarks.faults.models import Reader
from benchmarks.faults.program import Program, healthy

if TYPE_CHECKING:
    from benchmarks.faults.program import Run

_square = functional.mse_loss


def _waves(rows: int, length: int, noise: float = 0.1) -> Tensor:
    """Sums of two sines of random period and phase ``(rows, length, 1)``."""
    time = torch.arange(length).float()
    rate, phase = 0.1 + 0.4 * torch.rand(2, rows, 1), 2 * math.pi * torch.rand(2, rows, 1)
    return ((rate * time + phase).sin().sum(0) + noise * torch.randn(rows, length)).unsqueeze(2)


def _forecast(run: Run) -> None:
    data = _waves(300, 31)
    model = Reader(nn.GRU(1, 24, batch_first=True), 1, last=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    fit(run, model, optimizer, over(batches(32, data), lambda x: _square(model(x[:, :-1]), x[:, 1:])))


def _spoken(run: Run) -> None:
    """Five letters, each held for some frames with noise, to be read by CTC without knowing where each lies."""
    shapes = torch.randn(6, 8)
    model = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 7, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    lengths, letters = torch.full((16,), 20), torch.full((16,), 5)

    def loss() -> Tensor:
        target = torch.stack([torch.randperm(6)[:5] for _ in range(16)])
        frames = shapes[target.repeat_interleave(4, 1)] + 0.3 * torch.randn(16, 20, 8)
        scores = model(frames.transpose(1, 2)).permute(2, 0, 1).log_softmax(2)
        return functional.ctc_loss(scores, target + 1, lengths, letters)

    fit(run, model, optimizer, loss)


def _truncated(run: Run) -> None:
    """A state carried on from window to window, cut off from the backward."""
    stream = _waves(16, 20 * 40 + 1, noise=0.05)
    cell, head = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1)
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state: tuple[Tensor, Tensor] | None = None

    def loss() -> Tensor:
        nonlocal state
        start = run.made % 40 * 20
        if start == 0:
            state = None
        x = stream[:, start : start + 21]
        out, carried = cell(x[:, :-1], state)
        state = carried[0].detach(), carried[1].detach()
        return _square(head(out), x[:, 1:])

    fit(run, model, optimizer, loss)


def _causal_conv(run: Run) -> None:
    data = _waves(300, 49, noise=0.05).transpose(1, 2)
    layers: list[nn.Module] = []
    for inputs, spread in ((1, 1), (24, 2), (24, 4)):
        layers += [nn.ZeroPad1d((2 * spread, 0)), nn.Conv1d(inputs, 24, 3, dilation=spread), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv1d(24, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    fit(run, model, optimizer, over(batches(32, data), lambda x: _square(model(x[:, :, :-1]), x[:, :, 1:])))


PROGRAMS: tuple[Program, ...] = (
    healthy("waves by GRU", _forecast, "The loss stalls at the noise, early."),
    healthy("speech-like CTC", _spoken, "Loss and gradients fall a thousandfold."),
    healthy("state carried on", _truncated, "Every 40 steps the state is empty again and the loss jumps."),
    healthy("dilated convolutions", _causal_conv, "The loss falls fast, then stalls at the noise."),
)
