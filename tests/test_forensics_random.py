"""A training after a replay is bit-identical, over models that are drawn at random and have users' hooks of all kinds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gradwatch

WIDTH, ROWS, STEPS, BAD = 6, 9, 6, (2, 4)


class Last(nn.Module):
    """The last state of an LSTM or a GRU with dropout between its layers."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.cell(x[:, None].expand(-1, 3, -1))[0][:, -1]
        return result


class Saved(nn.Module):
    """A layer with dropout under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


class Fails(nn.Module):
    """Fails in its forward or in its backward, when it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.now = False

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        if not self.now:
            return x
        return (x * 0).log() if self.where == "forward" else (x * 0).abs().sqrt()


PARTS: dict[str, Any] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "dropout": lambda: nn.Dropout(0.3),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch norm, averaged": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "LSTM": lambda: Last(nn.LSTM),
    "GRU": lambda: Last(nn.GRU),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),  # its forward changes buffers
    "checkpoint": Saved,
    "activation in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "noise": nn.RReLU,
}


def drawn(seed: int) -> nn.Sequential:
    """Return a model of random parts, of which one fails at some steps."""
    choice = random.Random(seed)  # noqa: S311  no secret
    parts = [PARTS[choice.choice(sorted(PARTS))]() for _ in range(choice.randint(3, 6))]
    fails = Fails(choice.choice(["forward", "backward"]))  # no gate of a cell may swallow it
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *parts, fails, nn.Linear(WIDTH, 1))


def left_by(seed: int, *, look: bool) -> tuple[list[Tensor], list[str], gradwatch.Monitor]:
    """Train; return everything that is left, what hooks heard, and the monitor."""
    torch.manual_seed(seed)
    model, heard, left = drawn(seed), [], []
    fails = next(one for one in model if isinstance(one, Fails))
    model.register_forward_pre_hook(lambda *_: heard.append("before"))
    model[0].register_forward_hook(lambda _, __, out: heard.append(f"forward {float(out.detach().sum())}"))
    model[-1].register_full_backward_hook(lambda *_: heard.append("backward"))
    model[-1].register_full_backward_pre_hook(lambda *_: heard.append("before the backward"))
    first: Any = model[0]
    first.weight.register_hook(lambda gradient: heard.append(f"tensor {float(gradient.nan_to_num().sum())}"))
    first.bias.register_post_accumulate_grad_hook(lambda *_: heard.append("accumulated"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    skips = gradwatch.AutoClip(gradwatch.ClipNorm(1e9))  # which changes no gradient that is finite
    monitor = gradwatch.attach(model, report=None, strict=True, forensics=look, clip=skips)
    for step in range(STEPS):
        fails.now = step in BAD
        optimizer.zero_grad()
        loss = model(torch.randn(ROWS, WIDTH)).pow(2).mean()
        loss.backward()
        left.append(loss.detach())
        left += [one.grad.clone() for one in model.parameters() if one.grad is not None]
        optimizer.step()  # auto-clip leaves out the steps that fail, and puts buffers back
    monitor.detach()
    state: list[Any] = [*optimizer.state_dict()["state"].values()]
    moments = [value for one in state for value in one.values()]
    return [*left, *model.state_dict().values(), *moments, torch.get_rng_state()], heard, monitor


@pytest.mark.parametrize("seed", range(16))
def test_a_training_after_a_replay_is_bit_identical(seed: int) -> None:
    """As one in which nothing is looked for: losses, gradients, weights, buffers, moments, generator, and what hooks heard."""
    with_it, heard, monitor = left_by(seed, look=True)
    without, heard_without, _ = left_by(seed, look=False)
    assert monitor.incidents
    assert monitor.incidents[0].origin is not None, monitor.incidents[0].evidence
    assert monitor.incidents[0].origin.op in ("log", "sqrt")
    assert heard == heard_without
    assert len(with_it) == len(without)
    for number, (one, other) in enumerate(zip(with_it, without, strict=True)):
        assert torch.equal(one.nan_to_num(nan=-77.0), other.nan_to_num(nan=-77.0)), number
