"""Two processes that train together under each trainer: the same rows, the same end, the same checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra `frameworks`")
pytest.importorskip("lightning", reason="needs the extra `frameworks`")
pytest.importorskip("transformers", reason="needs the extra `frameworks`")
from tests.frameworks.together import BATCH, RATE, SURGE, data, mse, network
from tests.torchrun import played

WAYS = ("accelerate", "accelerate sharded", "transformers", "lightning stops", "lightning saves", "lightning sharded")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw under each trainer."""
    return played(tmp_path_factory, 2, "tests.frameworks.together")


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_see_and_do_the_same(seen: list[dict[str, Any]], way: str) -> None:
    """Down to the step at which they end."""
    one, other = (process[way] for process in seen)
    np.testing.assert_equal(one, other)
    assert one["verdict"] == "confirmed"
    assert not one["attached"]


@pytest.mark.parametrize("way", ["accelerate", "accelerate sharded", "lightning stops", "lightning sharded"])
def test_they_end_together(seen: list[dict[str, Any]], way: str) -> None:
    """Within a few steps of the surge."""
    assert SURGE < seen[0][way]["steps"] < SURGE + 10


def test_they_refuse_together(seen: list[dict[str, Any]]) -> None:
    """The checkpoint at step 80; that at step 40 has the reference values."""
    assert seen[0]["transformers"]["kept"] == ["checkpoint-40"]
    assert seen[0]["transformers"]["saved"]
    assert [name.partition("step=")[2] for name in seen[0]["lightning saves"]["kept"]] == ["40.ckpt"]
    assert not seen[0]["accelerate"]["worth"]


@pytest.mark.parametrize(("way", "kind"), [("accelerate", "Parameter"), ("accelerate sharded", "DTensor")])
def test_an_accelerator_saves_and_restores_their_reference_values(
    seen: list[dict[str, Any]], way: str, kind: str
) -> None:
    """Those of step 40, in each process; what is sharded is sharded."""
    assert [process[way]["restored"] for process in seen] == [40, 40]
    assert seen[0][way]["parameters"] == [kind]


@pytest.mark.parametrize("way", ["accelerate", "accelerate sharded", "lightning saves", "lightning sharded"])
def test_a_row_is_that_of_all_batches_together(seen: list[dict[str, Any]], way: str) -> None:
    """Against a loop in one process, whose batches are those of both."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    inputs, targets = data().tensors
    for step in range(SURGE):
        rows = slice(2 * step * BATCH, 2 * (step + 1) * BATCH)  # by batches or samples in turns, in the same order
        optimizer.zero_grad()
        loss = mse(model(inputs[rows]), targets[rows])
        loss.backward()
        losses.append(loss.item())
        norms.append(
            float(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]).norm())
        )
        optimizer.step()
    np.testing.assert_allclose(seen[0][way]["loss"][:SURGE], losses, rtol=1e-3)
    np.testing.assert_allclose(seen[0][way]["norm"][:SURGE], norms, rtol=1e-3)
