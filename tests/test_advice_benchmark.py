"""The benchmark that follows advice: what a sentence changes, and that the change is made."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from benchmarks.advice.following import Change, Following, changes_for, gated, orthogonal, swapped
from benchmarks.advice.table import rows_of
from benchmarks.faults.program import Done, run_program
from tests.trainings import data, mlp

SAID = {
    "Lower the learning rate: 8e-4 instead of 0.05. An update was 177 % of the weights in one step.": Change(
        rate=0.016
    ),
    "Lower the learning rate of the group of fc1: 1e-3 instead of 1,000. A step was to take 3 times as much.": Change(
        rate=1e-6
    ),
    "Lower the learning rate (0.1 when this began), or warm it up.": Change(rate=0.1),
    "Warm the rate up over the first few hundred steps; a clip does not repair a rate.": Change(warm_up=100),
    'Clip by norm when it happens: attach(model, clip="norm").': Change(clip=True),
    "If such batches recur, clip each step to a norm of 6.8, twice what is usual here.": Change(bound=6.8),
    "Put an L2 penalty on the weights.": Change(decay=1e-3),
    "The learning rate was raised from 0.02 to 2 at step 150: check its schedule, and go back to 0.02, which": Change(
        cap=0.02
    ),
    "Use an LSTM or GRU instead of the vanilla RNN, with gates that begin open: a bias.": Change(
        gates=True, open_gates=True
    ),
    "Initialise the recurrent weights orthogonally: they multiply the gradient.": Change(orthogonal=True),
    "Scale the inputs to zero mean and unit variance: far from zero.": Change(standard=True),
    "Lower the weight decay: 0.02 instead of 10. An update may change 12 % of the weights.": Change(less_decay=0.002),
}


@pytest.mark.parametrize("advice", SAID)
def test_a_sentence_says_what_to_change(advice: str) -> None:
    """With its number, where it has one."""
    (change,) = changes_for(advice)
    wanted = SAID[advice]
    assert change.rate == pytest.approx(wanted.rate)
    assert change.less_decay == pytest.approx(wanted.less_decay)
    assert replace(change, rate=1.0, less_decay=1.0) == replace(wanted, rate=1.0, less_decay=1.0)


def test_advice_that_only_narrows_down_changes_nothing() -> None:
    """Nobody can follow it without looking."""
    assert changes_for("Look at the batch of this step.") == ()
    assert (
        len(changes_for("Change the learning rate (0.1 when this began) by factors of three in both directions.")) == 4
    )


def test_advice_of_a_real_explosion_can_be_followed() -> None:
    """The benchmark reads the sentences that gradwatch says today."""
    torch.manual_seed(0)
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        (change,) = changes_for(monitor.incidents[0].advice[0])
        assert change.rate < 0.1


def one_step(change: Change) -> tuple[list[torch.Tensor], Following]:
    """Train one step by SGD at a rate of 1 with gradients of 1; return the weights and who followed."""
    following = Following(change)
    left: list[torch.Tensor] = []

    def train(run: object) -> None:
        model = nn.Linear(4, 1, bias=False)
        nn.init.ones_(model.weight)
        run.watch(model)  # type: ignore[attr-defined]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1.0
        left.append(model.weight.detach().clone())
        run.step(loss.item())  # type: ignore[attr-defined]
        raise Done

    run_program(train, 0, 1, following)
    following.close()
    return left, following


def test_the_change_is_made_and_leaves_the_programs_settings_alone() -> None:
    """Gradients of 1 on weights of 1."""
    for change, weight in (
        (Change(), 0.0),
        (Change(rate=0.25), 0.75),
        (Change(warm_up=10), 0.9),
        (Change(bound=1.0), 0.5),
        (Change(decay=0.5), -0.5),
    ):
        (after,), following = one_step(change)
        assert after.flatten().tolist() == pytest.approx([weight] * 4)
        assert following.changed


def test_modules_are_replaced_where_there_are_any() -> None:
    """Inside others too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    assert swapped(model, nn.Tanh, nn.ReLU)
    assert not swapped(model, nn.Tanh, nn.ReLU)
    assert isinstance(model[1][0], nn.ReLU)  # type: ignore[index]


def test_a_vanilla_recurrent_layer_becomes_an_lstm_that_the_optimizer_trains() -> None:
    """Although the optimizer was built before; its forget gates begin open for the steps of the first batch."""
    following = Following(Change(gates=True, open_gates=True))
    left: list[nn.Module] = []

    def train(run: object) -> None:
        model = nn.ModuleDict({"cell": nn.RNN(2, 4, batch_first=True)})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        run.watch(model)  # type: ignore[attr-defined]
        cell = model["cell"]
        cell(torch.ones(1, 20, 2))[0].sum().backward()
        before = [one.detach().clone() for one in cell.parameters()]
        left.append(cell)
        optimizer.step()
        assert not any(torch.equal(one, two) for one, two in zip(before, cell.parameters(), strict=True))
        raise Done

    run_program(train, 0, 1, following)
    following.close()
    assert following.changed
    (cell,) = left
    assert isinstance(cell, nn.LSTM)
    opened = gated(nn.RNN(2, 4, batch_first=True), open_gates=True)
    opened(torch.ones(1, 20, 2))
    assert opened.state_dict()["bias_hh_l0"][4:8].tolist() == pytest.approx([math.log(20)] * 4)


def test_recurrent_weights_become_orthogonal_and_inputs_standard() -> None:
    """Where there are any."""
    cell = nn.GRU(2, 4)
    assert orthogonal(cell)
    for part in cell.state_dict()["weight_hh_l0"].split(4):
        assert torch.allclose(part @ part.T, torch.eye(4), atol=1e-5)
    assert not orthogonal(mlp())
    following, seen = Following(Change(standard=True)), []
    model = mlp()
    following.watch(model)
    model[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = 2000 + 1000 * torch.randn(64, 8)
    model(x)
    following.close()
    assert following.changed
    assert seen[0].mean(0).abs().max() < 1e-3
    assert seen[0].std(0).tolist() == pytest.approx([1.0] * 8, rel=1e-3)


def test_runs_without_a_followed_advice_are_counted_apart() -> None:
    """Of two explosions, one could be followed by its first advice; a run without a warning is in no row."""
    results: list[dict[str, Any]] = [
        {"kind": "exploding", "advice": [], "first": True, "both": True},
        {"kind": "exploding", "advice": [], "first": None, "both": False},
        {"kind": None, "advice": [], "first": None, "both": None},
    ]
    assert rows_of(results) == [["exploding", "2", "1 of 1", "1 of 2"], ["all", "2", "1 of 1", "1 of 2"]]
