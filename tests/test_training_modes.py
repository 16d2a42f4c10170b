"""The number is right in every training mode: each mode of `tests.modes` against its own dumb loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from docs import training_modes
from gradwatch import device
from tests.modes import MODES, Mode
from tests.trainings import data, mlp


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_rows_agree_with_a_dumb_loop_in_float64(mode: Mode) -> None:
    """Each layer's norm and the global norm within 1e-6, with the loss and the provenance, one row for one step."""
    check(mode)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_rows_that_come_later_agree_as_well(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path for devices, taken on the CPU: the same numbers."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    check(mode)


def test_the_page_about_training_modes_is_current() -> None:
    """It is written from the lists that these tests walk over."""
    assert training_modes.PAGE.read_text() == training_modes.page()


def check(mode: Mode) -> None:
    """Train in one mode and compare every row with its truth."""
    monitors: list[gradwatch.Monitor] = []

    def watch(model: nn.Module) -> gradwatch.Monitor:
        monitors.append(gradwatch.attach(model, report=None, strict=True))
        return monitors[0]

    truths = list(mode.run(watch))
    history = monitors[0].history
    monitors[0].detach()
    assert truths
    assert history.rows == len(truths)
    expected = [[truth.norms.get(name, math.nan) for name in history.layers] for truth in truths]
    assert {name for truth in truths for name in truth.norms} <= set(history.layers)
    np.testing.assert_allclose(history.grad_norm(), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(history.global_norm(), [math.sqrt(np.nansum(np.square(e))) for e in expected], rtol=1e-6)
    losses = [math.nan if truth.loss is None else truth.loss for truth in truths]
    np.testing.assert_allclose(history.loss(), losses, rtol=1e-6)
    np.testing.assert_allclose(history.clip_coefficient(), [truth.left for truth in truths], rtol=1e-6)
    assert history.provenance.source == truths[-1].source
    assert history.provenance.clipped == truths[-1].clipped


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's own, after the graph break at backward
def test_a_compiled_step_has_as_many_graphs_and_breaks_as_without() -> None:
    """Of the optimizer's step and of the whole step; nothing of gradwatch is traced."""

    def counts(whole: bool, watched: bool) -> tuple[int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = gradwatch.attach(model, report=None, strict=True) if watched else None
        x, y = data()
        update = optimizer.step if whole else torch.compile(optimizer.step, backend="aot_eager")

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            update()

        run = torch.compile(step, backend="aot_eager") if whole else step
        for _ in range(5):
            run()
        if monitor is not None:
            monitor.detach()
            assert monitor.history.rows == 5
        found = torch._dynamo.utils.counters
        return found["stats"]["unique_graphs"], len(found["graph_break"])

    for whole in (False, True):
        graphs, breaks = counts(whole, watched=True)
        plain_graphs, plain_breaks = counts(whole, watched=False)
        assert graphs == plain_graphs
        assert breaks <= plain_breaks
