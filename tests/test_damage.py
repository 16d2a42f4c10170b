"""Tests of what is said when an incident is over: resolved, or over with damage, and whether auto-clip helped."""

from __future__ import annotations

import copy
import html
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.records import VERDICTS
from gradwatch.reports.standing import standing
from gradwatch.verdict import VerdictSettings

INPUTS, CLASSES = 8, 5
ROOT = Path(__file__).parent.parent


def classifier(**settings: Any) -> tuple[nn.Sequential, gradwatch.Monitor]:
    """A small ReLU network, watched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return model, gradwatch.attach(model, report=None, strict=True, **settings)


def learn(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    """Learn to say which of the first inputs is the largest; return the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, INPUTS, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, :CLASSES].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of each group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def all_say(monitor: gradwatch.Monitor, word: str) -> None:
    """The verdict, the guard, the summary and the snapshot of every report say the same."""
    snapshot = monitor._pipeline.snapshot()
    assert monitor.verdict == snapshot.verdict == word
    assert bool(monitor.checkpoint_guard()) == (word == "healthy")
    assert str(monitor.summary()).startswith(f"gradwatch {word}:")


def test_a_loss_that_stays_above_its_level_is_damage_until_it_is_back() -> None:
    """Two steps at a rate 600 times too high: the alarms end, and the loss is high until it has been learned again."""
    model, monitor = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = learn(model, optimizer, 200)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    rate(optimizer, 60.0)
    before += learn(model, optimizer, 2)
    rate(optimizer, 1e-6)
    after = learn(model, optimizer, 500)
    (incident,) = [one for one in monitor.incidents if one.kind == "exploding"]
    assert incident.verdict == "damaged"
    found = re.fullmatch(
        r"at step (\d+) the loss is (\S+) \(median of 16 losses\), it was (\S+) before step (\d+)", incident.left[0]
    )
    assert found is not None
    last, first = int(found[1]), int(found[4])
    losses = np.array(before + after)
    assert float(found[2]) == pytest.approx(np.median(losses[last - 15 : last + 1]), rel=0.01)
    assert float(found[3]) == pytest.approx(np.median(losses[first - 32 : first]), rel=0.01)
    assert last > len(losses) - 40
    all_say(monitor, "damaged")
    assert incident.left[0] in monitor.checkpoint_guard().reason
    assert incident.left[0] in str(monitor.summary())
    stands = re.search(r"  the loss is (\S+) \(median of 32 losses\), above", str(monitor.summary()))
    assert stands is not None  # two levels of one loss in one summary, each with its number of losses
    assert float(stands[1]) == pytest.approx(np.median(losses[-32:]), rel=0.01)
    with torch.no_grad():
        for parameter, well in zip(model.parameters(), kept, strict=True):
            parameter.copy_(well)
    rate(optimizer, 0.1)
    learn(model, optimizer, 100)
    assert monitor.incidents[0].verdict == "resolved"
    assert monitor.incidents[0].left == ()
    monitor.detach()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_run_that_exploded_at_once_is_not_well_before_it_has_learned(name: str) -> None:
    """Back at the level at which it began is not resolved: nothing has been learned since."""
    model, monitor = classifier()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1.0 if name == "Adam" else 6.0)
    losses = learn(model, optimizer, 400)
    assert np.median(losses[-16:]) > 0.9 * losses[0]
    assert monitor.verdict != "healthy"
    began = f"{losses[0]:.3g}"
    assert re.search(rf"(at which it began \({began}\)|it began at {began})", str(monitor.summary()))
    monitor.detach()


def test_a_first_explosion_after_which_nothing_is_learned_is_not_resolved_for_good() -> None:
    """What the loss would have been is not known; that it has hardly fallen since the explosion is."""
    model, monitor = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=6.0)
    half_way = copy.deepcopy(model)
    losses = learn(half_way, torch.optim.SGD(half_way.parameters(), lr=0.1), 40)
    assert 0.6 * losses[0] < losses[-1] < 0.9 * losses[0]
    learn(model, optimizer, 5)
    model.load_state_dict(half_way.state_dict())
    rate(optimizer, 1e-5)
    learn(model, optimizer, 150)
    (incident,) = [one for one in monitor.incidents if one.severity != "notice"]
    assert incident.opened_step < 5
    assert incident.verdict == "resolved"
    learn(model, optimizer, 200)
    assert re.match(
        r"the loss is 1\.\d+ \(median of 32 losses\) and has hardly fallen since step \d+ ",
        monitor.incidents[0].left[0],
    )
    all_say(monitor, "damaged")
    rate(optimizer, 0.1)
    learn(model, optimizer, 300)
    assert monitor.incidents[0].verdict == "resolved"
    monitor.detach()


def test_a_layer_whose_gradient_ended_is_named() -> None:
    """A rate that kills all ReLUs: the loss goes back to that of guessing, and the layers behind them are dead."""
    model, monitor = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn(model, optimizer, 100)
    with torch.no_grad():
        model[2].bias.fill_(-1e4)  # type: ignore[operator]
    rate(optimizer, 5.0)
    learn(model, optimizer, 1)
    rate(optimizer, 0.1)
    learn(model, optimizer, 300)
    assert monitor.verdict != "healthy"
    assert any("2.weight" in line for one in monitor.incidents for line in (*one.left, *one.layers))
    monitor.detach()


def test_an_outlier_that_did_no_harm_is_resolved_with_both_levels() -> None:
    """One batch of huge inputs, clipped: the loss is back, and the record names the level of before and the level now."""
    model, monitor = classifier(clip=gradwatch.AutoClip("norm", hold=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = learn(model, optimizer, 100)
    x = 1e4 * torch.randn(64, INPUTS)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.randint(CLASSES, (64,))).backward()
    optimizer.step()
    learn(model, optimizer, 100, seed=3)
    incident = monitor.incidents[0]
    record = incident.clip
    assert incident.verdict == "resolved"
    assert record is not None
    assert record.helped
    assert record.loss_before == pytest.approx(np.median(before[-32:]), rel=0.02)
    assert f", {record.loss_before:.3g} before the fault" in str(record)
    all_say(monitor, "healthy")
    assert standing(monitor._pipeline.snapshot())[-1] == "1 incident resolved"
    monitor.detach()


def test_it_helped_is_not_said_where_nothing_was_changed_or_no_loss_was_seen() -> None:
    """A loss that is NaN while every gradient is zero: no step is clipped or skipped."""
    model, monitor = classifier(clip="norm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learn(model, optimizer, 50)
    x = torch.randn(32, INPUTS)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.full((32,), -100)).backward()
    optimizer.step()
    learn(model, optimizer, 100)
    for incident in monitor.incidents:
        if incident.clip is not None:
            assert incident.clip.helped is None
            assert "helped" not in str(incident.clip)
    monitor.detach()


def test_a_run_that_ends_at_nan_says_since_when() -> None:
    """In the summary, with the step of the first NaN."""
    model, monitor = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn(model, optimizer, 30)
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    learn(model, optimizer, 20)
    assert "the loss is NaN, and has not been finite since step 30" in str(monitor.summary())
    all_say(monitor, "confirmed")
    monitor.detach()


def test_what_a_notice_has_left_is_damage_too() -> None:
    """A program makes the weights anew in mid-run: a notice, and no checkpoint until the loss is back."""
    model, monitor = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    before = learn(model, optimizer, 400)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    after = learn(model, optimizer, 12)
    (incident,) = monitor.incidents
    assert incident.open
    all_say(monitor, "damaged")
    for shown in (str(monitor.summary()), monitor._repr_html_()):
        assert incident.advice[0] in html.unescape(shown)
    after += learn(model, optimizer, 28)
    (incident,) = monitor.incidents
    assert (incident.opened_step, incident.severity, incident.verdict) == (400, "notice", "damaged")
    assert min(after) > 2 * np.median(before[-32:])
    all_say(monitor, "damaged")
    assert incident.left[0] in standing(monitor._pipeline.snapshot())
    learn(model, optimizer, 800)
    assert monitor.incidents[0].verdict == "resolved"
    all_say(monitor, "healthy")
    monitor.detach()


def test_each_word_of_the_verdict_has_one_definition() -> None:
    """It is printed by `gradwatch explain verdict`, and stands in the documentation."""
    for page in (VerdictSettings.documentation(), (ROOT / "docs" / "detection.md").read_text()):
        for word, meaning in VERDICTS.items():
            assert page.count(f"* **{word}**: {meaning}.") == 1


def test_a_part_that_wakes_up_for_a_step_is_not_called_well() -> None:
    """A generator whose gradient is exactly zero on all but a few steps is one incident, open until the end."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": nn.Linear(8, 8), "critic": nn.Linear(8, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(500):
            x = torch.randn(16, 8)
            awake = step < 50 or step % 120 == 0
            loss = (model["critic"](x) - torch.randn(16, 1)).square().mean()
            loss = loss + 0.1 * float(awake) * model["generator"](x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = [one for one in monitor.incidents if one.kind == "dead"]
        assert len(found) == 1
        assert found[0].open
        assert monitor.verdict != "healthy"


@pytest.mark.parametrize("seed", range(3))
def test_what_the_first_losses_were_by_chance_is_no_level_that_a_notice_has_undone(seed: int) -> None:
    """As where the first amounts are all zero: the loss of those to come is not learned yet, and not lost."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(0.1)
        model.get_parameter("2.bias").zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for step in range(400):
            amounts = torch.randn(32, 1).exp() * (torch.rand(32, 1) < (0.0 if step < 7 else 0.1))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(torch.randn(32, 8)), amounts).backward()
            optimizer.step()
        assert monitor.incidents[0].opened_step == 7
        assert all(one.severity == "notice" for one in monitor.incidents if one.kind == "spike" and one.opened_step > 7)
        all_say(monitor, "healthy")
