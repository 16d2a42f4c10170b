"""The number is right in every training mode: each mode of `tests.modes` against its own dumb loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

import gradwatch
from tests.modes import MODES, Mode

if TYPE_CHECKING:
    from torch import nn


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_rows_agree_with_a_dumb_loop_in_float64(mode: Mode) -> None:
    """Each layer's norm and the global norm within 1e-6, with the loss and the provenance, one row for one step."""
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
