"""Layers out of the ordinary: without elements, without gradients, of kinds that cannot be measured."""

from __future__ import annotations

import torch
from torch import nn

import gradwatch
from gradwatch.rules import GradientsAboveOne
from tests.trainings import data, mlp


def watched(model: nn.Module, steps: int, extra: str = "", scale: float = 1.0, **settings: object) -> gradwatch.Monitor:
    """Train; the parameter ``extra`` adds its sum to the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = data()
    with gradwatch.attach(model, report=None, strict=True, **settings) as monitor:  # type: ignore[arg-type]
        for _ in range(steps):
            optimizer.zero_grad()
            loss = scale * nn.functional.mse_loss(model(x), y)
            (loss + getattr(model, extra).sum() if extra else loss).backward()
            optimizer.step()
    return monitor


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    """Return a small model with one parameter more, called extra."""
    torch.manual_seed(0)
    model = mlp()
    model.register_parameter("extra", parameter)
    return model


def test_a_layer_without_elements_is_neither_dead_nor_in_the_way_of_other_rules() -> None:
    """A vector and a matrix without elements: no incident; where all others' gradients are large, that is still seen."""
    for shape in ((0,), (0, 3), (3, 0)):
        monitor = watched(with_parameter(nn.Parameter(torch.zeros(shape))), 70, "extra")
        assert monitor.incidents == []
        large = watched(
            with_parameter(nn.Parameter(torch.zeros(shape))), 5, "extra", scale=1e4, rules=[GradientsAboveOne()]
        )
        assert [alarm.code for alarm in large.alarms] == ["GW203"]


def test_a_layer_that_never_gets_a_gradient_is_not_called_dead() -> None:
    """Its norm is missing, not zero."""
    monitor = watched(with_parameter(nn.Parameter(torch.ones(4, 4))), 70)
    assert monitor.incidents == []
