"""Words that are true when they are said: trainings with a fault that is known, and what they are told of it."""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable


def mlp(outputs: int = 1, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Two layers of 32 units, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, outputs))


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Make one step of a loop, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def advice(monitor: gradwatch.Monitor) -> str:
    """All advice on all incidents, as one text."""
    return " ".join(line for incident in monitor.incidents for line in incident.advice)


def test_weights_that_a_nan_has_damaged_are_not_its_origin() -> None:
    """They are what it has left: there is one more thing to do, and the batch stays named."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(80):
            x = torch.randn(32, 8)
            if number == 40:
                x[3, 2] = torch.nan
            step(optimizer, nn.functional.mse_loss(model(x), torch.ones(32, 1)))
        (incident,) = monitor.incidents
        assert (incident.kind, incident.opened_step) == ("nonfinite", 40)
        assert incident.origin is None or incident.origin.step == 40
        assert "was not finite before the forward" not in str(monitor.summary())
        assert any(
            "NaN or infinity in the batch" in line or "where they are loaded" in line for line in incident.advice
        )
        assert "Go back to a checkpoint from before step 40: weights hold NaN or infinity since step 41" in advice(
            monitor
        )


def test_a_target_that_holds_nan_is_named_in_the_advice() -> None:
    """Not "look at where it is made", which leaves open what."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(60):
            x, y = torch.randn(32, 8), torch.ones(32, 1)
            y[3] = torch.nan if number == 50 else 1.0
            step(optimizer, nn.functional.mse_loss(model(x), y))
        assert monitor.incidents[0].advice[0] == (
            "Look at where the `target` of `mse_loss` is made: it holds values that are not finite."
        )


def test_no_second_weight_decay_is_advised() -> None:
    """AdamW has one."""
    for decay in (0.01, 0.0):
        model = mlp(5, nn.ReLU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.0, weight_decay=decay)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(20):
                x = torch.randn(64, 8)
                step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
            assert ("L2 penalty" in advice(monitor)) is (decay == 0)


def test_a_rate_that_was_raised_is_the_cause_and_the_batch_is_not() -> None:
    """The loss jumps in the next step, by an update that may have raised it; at first that is a spike."""
    model = mlp(5, nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(200):
            optimizer.param_groups[0]["lr"] = 0.3 if number >= 197 else 1e-3
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
            if monitor.incidents:
                assert (
                    monitor.incidents[0]
                    .advice[0]
                    .startswith("The learning rate was raised from 0.001 to 0.3 at step 197")
                )
                assert "Look at the batch" not in advice(monitor)
        assert monitor.incidents


def test_the_rate_of_the_other_of_two_optimizers_is_named() -> None:
    """One backward feeds both, and the step that sees the damage belongs to the one that did not do it."""
    model = mlp(5, nn.ReLU)
    body = torch.optim.Adam(model[:4].parameters(), lr=1e-3)
    head = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(120):
            head.param_groups[0]["lr"] = 50.0 if number >= 100 else 0.1
            x = torch.randn(64, 8)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
            body.step()
            head.step()
        assert monitor.incidents[0].suspect == "4.weight"
        assert monitor.incidents[0].advice[0].startswith("The learning rate was raised from 0.1 to 50 at step 201")
        assert "cannot have raised" not in advice(monitor)
        assert "instead of 0.001" not in advice(monitor)


def test_a_rate_that_rises_until_it_is_too_high_was_not_borne() -> None:
    """As in a one-cycle schedule: the rate is named, not a single step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8.0, total_steps=800)
    labels = torch.randn(20, 10)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(150):
            x = torch.randn(64, 20)
            step(optimizer, nn.functional.cross_entropy(model(x), (x @ labels).argmax(1)))
            schedule.step()
        assert any(incident.kind == "exploding" for incident in monitor.incidents)
        assert "had borne until then" not in advice(monitor)
        assert "learning rate" in monitor.incidents[0].advice[0]


def test_a_jump_that_no_update_can_have_caused_is_not_met_with_the_rate() -> None:
    """Targets that change for good: the loss stays up for long."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(260):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1] * (1 if number < 200 else 30)))
        assert monitor.incidents[0].opened_step == 200
        assert monitor.incidents[0].kind == "diverging"
        assert "cannot have raised" in advice(monitor)
        assert "learning rate" not in advice(monitor)


def test_one_odd_batch_under_adam_is_looked_at_before_the_rate() -> None:
    """Its gradient is a million times the usual one, at a rate that has not changed."""
    model = mlp(1, nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(130):
            x = torch.randn(32, 8)
            y = x[:, :1] - x[:, 1:2]
            x[3] *= 1e4 if number == 120 else 1
            step(optimizer, nn.functional.mse_loss(model(x), y))
        assert monitor.incidents[0].opened_step == 120
        assert "step 120" in monitor.incidents[0].advice[0]
        assert "Lower the learning rate" not in advice(monitor)


def test_the_summary_says_once_how_the_loss_stands() -> None:
    """A unit that saturates in the first step: what the incident has left is that the loss hardly falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.mse_loss(model(x), 20 * (x[:, :1] > 0).float()))
        assert monitor.verdict == "damaged"
        head = str(monitor.summary()).partition("last loss")[0]
        assert head.count("hardly fallen") == 1


def test_what_the_clip_record_says_of_damage_is_true_when_it_is_gone() -> None:
    """A run that exploded is clipped, then trained on at a low rate until its loss is back."""
    model = mlp(5, nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, clip="norm", strict=True) as monitor:
        for number in range(1500):
            optimizer.param_groups[0]["lr"] = (
                30.0 if 300 <= number < 308 else 0.1 if number < 500 or number >= 700 else 1e-7
            )
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
            record = monitor.incidents[0].clip if monitor.incidents else None
            if record is not None and record.damage:
                assert ("over, with damage, which was gone by step" in str(record)) is (monitor.incidents[0].left == ())
        assert record is not None
        assert record.damage
        assert monitor.incidents[0].verdict == "resolved"
        assert "which was gone by step" in str(record)


def classify(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, gamma: float = 1.0) -> gradwatch.Monitor:
    """Learn to say which of five numbers is the largest, with a rate that falls by ``gamma`` in each step."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(64, 8)
            logits = model(x.to(next(model.parameters()).dtype)).float()
            step(optimizer, nn.functional.cross_entropy(logits, x[:, :5].argmax(1)))
            schedule.step()
    return monitor


def test_weights_that_a_decay_has_shrunk_are_not_met_with_a_rate_in_the_thousands() -> None:
    """The decay is named with what it takes, and followed, the run learns."""
    model = mlp(5, nn.ReLU)
    monitor = classify(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), 300)
    first = advice(monitor)
    assert first.startswith("Lower the weight decay: 0.001 instead of 0.5. It takes 5 % of the weights in each step")
    assert "Raise the learning rate" not in first
    model = mlp(5, nn.ReLU)
    assert classify(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.001), 300).verdict == "healthy"


def test_a_rate_that_a_schedule_has_lowered_too_far_is_told_with_its_fall() -> None:
    """Not as one that was chosen; and nothing puts the weights back."""
    model = mlp(5, nn.ReLU)
    first = advice(classify(model, torch.optim.Adam(model.parameters(), lr=1e-3), 300, gamma=0.93))
    assert first.startswith("The learning rate has fallen from 0.001 to ")
    assert "check its schedule" in first
    assert "old values" not in first


def test_updates_that_bfloat16_weights_round_away_are_told_where_the_loss_stalls() -> None:
    """A few weights change in each step, so none is frozen."""
    model = mlp(5, nn.ReLU).bfloat16()
    first = advice(classify(model, torch.optim.AdamW(model.parameters(), lr=1e-5), 300))
    assert "Keep a float32 copy of half-precision weights" in first


def test_damage_that_was_taken_for_a_routine_counts_again_once_the_jumps_grow() -> None:
    """Q-learning whose values run away: no jump of the series is called resolved in the end, with a loss far above it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    target = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(1000):
            if number % 100 == 0:
                target.load_state_dict(model.state_dict())
            x, action = torch.randn(64, 4), torch.randint(2, (64,))
            reward = torch.where(action == 0, x[:, 0], -x[:, 0])
            value = reward + 1.5 * target(torch.randn(64, 4)).amax(1).detach()
            step(optimizer, nn.functional.mse_loss(model(x).gather(1, action[:, None])[:, 0], value))
        warned = [incident for incident in monitor.incidents if incident.severity != "notice"]
        assert len(warned) > 2
        assert all(incident.verdict != "resolved" for incident in warned)
        assert "resolved" not in str(monitor.summary()).partition("last loss")[0]


def test_an_explosion_is_not_resolved_while_the_layers_that_it_has_killed_are_dead() -> None:
    """A gradient that wakes them for a step ends neither."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8.0, total_steps=800)
    labels, woke = torch.randn(20, 10), False
    with gradwatch.attach(model, report=None, clip="norm", strict=True) as monitor:
        for _ in range(800):
            x = torch.randn(64, 20)
            step(optimizer, nn.functional.cross_entropy(model(x), (x @ labels).argmax(1)))
            schedule.step()
            dead = [incident for incident in monitor.incidents if incident.kind == "dead" and incident.open]
            if dead:
                woke |= float(monitor.history.grad_norm(last=1)[0][0]) > 0
                assert all(incident.verdict != "resolved" for incident in monitor.incidents)
        assert woke


def test_a_good_model_whose_first_batches_differ_is_not_damaged() -> None:
    """A pre-trained one: the loss is where it was, and a batch that was worse has done no harm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(150):
            x = torch.randn(64, 8)
            noise = torch.randn(64, 1) * (0.1 if number == 4 else 0.02)
            step(optimizer, nn.functional.mse_loss(model(x), model(x).detach() + noise))
            assert all(incident.verdict != "damaged" for incident in monitor.incidents)
        assert [(incident.kind, incident.severity) for incident in monitor.incidents] == [("spike", "notice")]
        assert monitor.verdict == "healthy"


def test_a_clip_that_leaves_nothing_is_the_first_advice_where_the_loss_stalls() -> None:
    """It is known how little it leaves."""
    model = mlp(5, nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        assert (
            monitor.incidents[0]
            .advice[0]
            .startswith("Raise the bound of your own clip: of the gradients of the last steps")
        )


def test_a_loss_that_runs_down_without_a_floor_is_asked_for_its_sign() -> None:
    """A lower rate would only make it slower."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(80):
            x = torch.randn(32, 8)
            step(optimizer, -(model(x) - x[:, :1] + x[:, 1:2]).square().mean())
        assert monitor.incidents[0].advice[0].startswith("Check the sign of the loss, or bound it: it ran down to -")


def test_a_momentum_that_adds_up_a_thousand_updates_is_named_and_lowering_it_helps() -> None:
    """The rate is an ordinary one."""

    def run(momentum: float) -> gradwatch.Monitor:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(200):
                x = torch.randn(32, 8)
                step(optimizer, nn.functional.mse_loss(model(x), x[:, :1] - x[:, 1:2]))
        return monitor

    assert run(0.999).incidents[0].advice[0].startswith("Lower the momentum: 0.9 instead of 0.999")
    assert run(0.9).verdict == "healthy"


def test_a_layer_that_the_program_has_set_anew_is_named_and_not_the_batch() -> None:
    """It alone has moved."""
    model = mlp(5, nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(320):
            if number == 300:
                nn.init.normal_(next(model[4].parameters()), std=2.0)
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
        assert monitor.incidents[0].opened_step == 300
        assert (
            monitor.incidents[0].advice[0].startswith("Look at what changed the weights just before step 300: 4.weight")
        )
        assert "batch" not in monitor.incidents[0].advice[0]


def test_a_dropout_of_everything_is_named_where_layers_are_dead() -> None:
    """A new initialisation or other activations would not help."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(1.0), nn.Linear(32, 5))
    monitor = classify(model, torch.optim.Adam(model.parameters(), lr=1e-3), 60)
    assert [incident.kind for incident in monitor.incidents] == ["dead"]
    assert monitor.incidents[0].advice == (
        "Lower the p of dropout 2: at 1 it drops everything, and no gradient passes.",
    )


def test_an_optimizer_of_another_model_is_the_first_advice() -> None:
    """There is no rate to change."""
    model, other = mlp(), mlp()
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(100):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x) + other(x), x[:, :1]))
            model.zero_grad()
        incident = next(one for one in monitor.incidents if one.kind == "frozen")
    assert "no optimizer that made a step holds it" in incident.evidence[0]
    assert incident.advice == (
        f"Build the optimizer from model.parameters() after the model is final: none that made a step holds {incident.suspect}.",
    )


def test_a_loss_rule_that_goes_to_rest_resolves_nothing() -> None:
    """Jumps with a period let it rest, but a loss that has not fallen by then has not fallen."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(800):
            x = torch.randn(32, 8)
            y = x[:, :1] * x[:, 1:2]
            if number % 200 == 150:
                y[:3] = 300.0
            step(optimizer, nn.functional.mse_loss(model(x), y))
        stalled = [incident for incident in monitor.incidents if incident.kind == "stalled"]
        assert [incident.open for incident in stalled] == [True]


def test_a_skipped_nan_in_the_first_steps_leaves_no_damage_where_the_loss_has_come_down_since() -> None:
    """Nothing has exploded, so that nothing has to be learned to be back; a loss above its level is damage."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for number in range(140):
            x = torch.randn(256, 8)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1]) * (torch.nan if number == 5 else 1))
        (incident,) = monitor.incidents
        assert (incident.kind, incident.verdict, incident.left) == ("nonfinite", "resolved", ())


def test_an_update_is_as_long_as_the_evidence_says() -> None:
    """A rate that is to move weights by a multiple of themselves: evidence and advice give the same one."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(30):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x), 300 * x[:, :1]))
        incident = next(one for one in monitor.incidents if any(sign.code == "GW303" for sign in one.signs))
    told = re.search(
        r"An update was to be (\S+) times as long as (?:the weights of|.* initialisation of) (\S+)\.", advice(monitor)
    )
    assert told is not None, advice(monitor)
    sign = next(one for one in incident.signs if one.code == "GW303" and one.layer == told[2])
    weight = max(sign.numbers["weight"], sign.numbers["floor"])
    assert float(told[1]) == pytest.approx(sign.numbers["update"] / weight, rel=0.01)


def test_an_explosion_before_a_new_optimizer_is_no_new_task() -> None:
    """Some programs make a new one for each epoch: the loss has to come back to the level before the explosion."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(500):
            if number == 200:
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
            if number == 195:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(-8.0)
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1]))
        assert not any("new task" in note for note in monitor.notes)
        assert monitor.verdict != "healthy"


def around_a_hundred() -> tuple[torch.Tensor, torch.Tensor, nn.Sequential]:
    """Inputs, targets around 100, which make gradients above 1 from the first steps on, and a model."""
    torch.manual_seed(0)
    x = torch.randn(4000, 10)
    y = 100 + x @ torch.randn(10, 1)
    return x, y, nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def test_the_level_before_a_fault_is_not_that_of_a_sign_which_has_fired_since_the_start() -> None:
    """Gradients were above 1 since step 2, where the loss was 9,950: "resolved" was said of a loss at 24 times its level."""
    x, y, model = around_a_hundred()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    last = model[4]
    assert isinstance(last, nn.Linear)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(600):
            if number == 300:
                last.weight.data.mul_(-0.6)
            optimizer.param_groups[0]["lr"] = 3e-3 if number < 300 else 1e-6
            batch = torch.randint(0, 4000, (64,))
            step(optimizer, nn.functional.mse_loss(model(x[batch]), y[batch]))
    (exploded,) = [one for one in monitor.incidents if one.kind == "exploding"]
    assert monitor.verdict == "damaged"
    assert re.search(r"the loss is [\d,]+ \(median of 16 losses\), it was 1\d\d before step 300", exploded.left[0])


def test_a_loss_that_an_odd_batch_has_raised_for_good_is_no_notice() -> None:
    """The loss of the batch itself is so high that a loss at 750 times its level seemed nearly back."""
    x, y, model = around_a_hundred()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(1300):
            batch = torch.randint(0, 4000, (64,))
            targets = y[batch].clone()
            if number == 900:
                targets[:4] = 1e7
            step(optimizer, nn.functional.mse_loss(model(x[batch]), targets))
    assert monitor.verdict == "damaged"
    assert not monitor.checkpoint_guard()


@pytest.mark.parametrize(("normal", "high"), [(0.05, 20.0), (0.02, 8.0)])
def test_a_rate_that_is_far_too_high_for_one_step_is_named(normal: float, high: float) -> None:
    """The rows before it are not judged one by one: it was put on the batch of the next step."""
    model = mlp(5, nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=normal, momentum=0.9 if normal < 0.05 else 0.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(300):
            optimizer.param_groups[0]["lr"] = high if number == 200 else normal
            x = torch.randn(32, 8)
            labels = torch.where(torch.rand(32) < 0.1, torch.randint(0, 5, (32,)), x[:, :5].argmax(1))
            step(optimizer, nn.functional.cross_entropy(model(x), labels))
    first = next(one for one in monitor.incidents if one.severity != "notice")
    told = f"it was {high:g} at step 200 alone, and {normal:g} after it." if first.opened_step > 200 else f"{high:g}"
    assert told in first.advice[0]
    assert "batch" not in first.advice[0]


def test_losses_that_are_all_nan_are_no_notice() -> None:
    """That a batch without a label does no harm is no comfort where every batch is one."""
    model = mlp(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(60):
            if number == 30:
                assert monitor.verdict == "healthy"
            step(optimizer, nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.full((32,), -100)))
    assert monitor.verdict == "suspected"
    assert "The weights took no harm" in monitor.incidents[0].advice[0]


def test_a_search_for_a_loss_scale_goes_on_until_it_is_one() -> None:
    """A loss of 1e5, as of a sum, needs 15 halvings from the usual first scale."""
    model = mlp(4, nn.ReLU)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-6), torch.amp.GradScaler("cpu")
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(60):
            x = torch.randn(32, 8)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = 1e5 * nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2**6
    assert monitor.incidents == []


@pytest.mark.parametrize("watched", [False, True])
def test_after_nan_alone_no_norm_is_clipped(watched: bool) -> None:
    """Steps that are not finite are left out, as by hand; norms are 30 here, and a bound of 1 held up the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    slope = 5 * torch.randn(20, 1)
    monitor = gradwatch.attach(model, report=None, clip="norm", strict=True) if watched else None
    for number in range(200):
        x = torch.randn(64, 20)
        target = x @ slope
        if number % 15 == 3:
            x[0, 0] = torch.nan
        loss = nn.functional.mse_loss(model(x), target)
        if watched or loss.isfinite():
            step(optimizer, loss)
    with torch.no_grad():
        x = torch.randn(1000, 20)
        assert nn.functional.mse_loss(model(x), x @ slope) < 5  # 3.5; it was above 100
    if monitor is not None:
        assert [one.clip.clipped for one in monitor.incidents if one.clip is not None] == [0]
        monitor.detach()


def test_a_loss_that_stays_orders_of_magnitude_above_its_level_is_not_healthy() -> None:
    """It is a seventh of what it was at first, and 3,000 times what had been reached; no update did it, and no clip helps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    slope, losses = 5 * torch.randn(20, 1), []
    with gradwatch.attach(model, report=None, clip="norm", strict=True) as monitor:
        for number in range(800):
            optimizer.param_groups[0]["lr"] = 0.01 if number < 600 else 1e-6
            x = torch.randn(64, 20)
            loss = nn.functional.mse_loss(model(x * (1 if number < 600 else 0.5)), x @ slope)
            losses.append(loss.item())
            step(optimizer, loss)
        assert not monitor.checkpoint_guard()
    assert 100 * losses[590] < losses[610] < losses[0] / 2
    (incident,) = (one for one in monitor.incidents if one.severity != "notice")
    assert (incident.kind, incident.verdict) == ("diverging", "damaged")
    assert "before step 600" in incident.left[0]
    assert incident.advice[0].startswith("Look at what changed about step 600")
    assert incident.clip is None or incident.clip.clipped == 0


def test_a_cross_entropy_that_only_rises_is_told_with_the_option_that_raises_it() -> None:
    """It doubles every hundred steps, so that no step stands out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, maximize=True)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = 2 * torch.randn(32, 20)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
        assert monitor.verdict == "suspected"
    incident = next(one for one in monitor.incidents if one.kind == "diverging")
    assert incident.advice == (
        "SGD was made with maximize=True: each step raises the cross-entropy. Leave maximize out, unless that is meant.",
    )


@pytest.mark.parametrize("minus", [False, True])
def test_what_is_meant_to_be_raised_is_healthy(minus: bool) -> None:
    """A reward, or a loss with a minus sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(32, 20)
            output, labels = model(x), x[:, :5].argmax(1)
            reward = nn.functional.softmax(output, 1).gather(1, labels[:, None]).mean()
            step(optimizer, -nn.functional.cross_entropy(output, labels) if minus else reward)
        assert (monitor.verdict, monitor.incidents) == ("healthy", [])
    assert any("the optimizer raises it (maximize=True)" in note for note in monitor.notes)
    assert monitor.snapshot().ending == ""


def test_nan_in_a_batch_while_the_loss_comes_down_from_an_outlier_is_a_cause_of_its_own() -> None:
    """Fifteen steps after the outlier; the notice on it stays a notice."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, clip="norm", strict=True, forensics=False) as monitor:
        for number in range(300):
            x = torch.randn(32, 8)
            target = 2 * x[:, :1]
            if number == 150:
                target[3] = 2000
            if number == 165:
                x[0, 0] = torch.nan
            step(optimizer, nn.functional.mse_loss(model(x), target))
    outlier, batch = monitor.incidents
    assert (outlier.opened_step, outlier.kind, outlier.severity) == (150, "spike", "notice")
    assert (batch.opened_step, batch.kind) == (165, "nonfinite")
    assert outlier.advice[0].startswith("Look at the batch of step 150")
    assert "NaN" in batch.advice[0]


def test_an_infinite_target_gets_no_advice_on_the_rate() -> None:
    """No update has made it."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with gradwatch.attach(model, report=None, clip="norm", strict=True) as monitor:
        for number in range(120):
            x = torch.randn(32, 8)
            target = 2 * x[:, :1]
            if number == 80:
                target[3] = torch.inf
            step(optimizer, nn.functional.mse_loss(model(x), target))
    (incident,) = monitor.incidents
    assert "`target` of `mse_loss`" in incident.advice[0]
    assert "rate" not in advice(monitor)


class Adapted(nn.Module):
    """A frozen net of two layers, each with an addend of rank 4 that begins at zero (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).requires_grad_(False)
        self.a1, self.b1 = nn.Parameter(torch.randn(4, 20) / 20**0.5), nn.Parameter(torch.zeros(64, 4))
        self.a2, self.b2 = nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        first, _, second = self.base
        hidden = (first(x) + x @ self.a1.T @ self.b1.T).relu()
        told: torch.Tensor = second(hidden) + hidden @ self.a2.T @ self.b2.T
        return told


def test_an_adapter_at_a_thousandth_of_its_rate_is_told_to_raise_it() -> None:
    """Matrices that began at zero pass little back to those behind them: nothing explodes there, and nothing vanishes."""
    torch.manual_seed(0)
    model = Adapted()
    before = torch.optim.Adam(model.base.requires_grad_().parameters(), lr=3e-3)
    for _ in range(400):
        x = torch.randn(64, 20)
        step(before, nn.functional.cross_entropy(model(x), (x[:, :5].argmax(1) + 1) % 5))
    model.base.requires_grad_(False)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=3e-6)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(32, 20)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
    (incident,) = monitor.incidents
    assert (incident.kind, incident.severity) == ("stalled", "warning")
    assert "above that of guessing among 5 classes" in " ".join(incident.evidence)
    assert re.match(r"Raise the learning rate: \S+ instead of 3e-6", incident.advice[0])


def test_gradients_that_no_usual_rate_fits_are_not_met_with_a_rate_of_ninety() -> None:
    """The loss is divided by a million."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(32, 20)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)) / 1e6)
    assert monitor.incidents[0].advice[0].startswith("Look at what makes the gradients so small")


def test_classes_are_those_that_the_loss_compares() -> None:
    """The head of a language model shares its weights with the embedding, whose gradient comes last."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(500, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 500, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            told: torch.Tensor = self.head(torch.tanh(self.hidden(self.embedding(x))))
            return told

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randint(0, 500, (64,))
            step(optimizer, nn.functional.cross_entropy(model(x), (x + 1) % 500))
    assert "above that of guessing among 500 classes (ln 500 = 6.21)" in " ".join(monitor.incidents[0].evidence)


def test_a_loss_that_is_made_anew_reaches_no_layer_and_that_is_told() -> None:
    """It has a gradient of its own, and none of the model's."""
    model = mlp(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(120):
            x = torch.randn(32, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).item()
            step(optimizer, torch.tensor(loss, requires_grad=True))
        assert monitor.verdict == "suspected"
    (incident,) = monitor.incidents
    assert incident.advice[0].startswith(
        "Look for what cuts the loss off from the model: no gradient has reached any layer."
    )


def test_a_cross_entropy_below_zero_is_none() -> None:
    """nll_loss of raw scores has no floor: it can only run away."""
    model = mlp(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(60):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.nll_loss(model(x), x[:, :5].argmax(1)))
        assert monitor.verdict == "suspected"
    (incident,) = monitor.incidents
    assert "no cross-entropy can be below zero" in incident.evidence[0]
    (line,) = incident.advice
    assert line.startswith("The cross-entropy is below zero: nll_loss got numbers that are no log-probabilities.")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_of_losses_is_not_compared_with_guessing(reduction: str) -> None:
    """Thirty-two samples of which each is far below guessing, at a rate that changes nothing."""
    torch.manual_seed(0)
    model = mlp(5)
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        x = torch.randn(32, 8)
        step(first, nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(320):
            x = torch.randn(32, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1), reduction=reduction)
            step(optimizer, loss)
    assert "GW405" not in {alarm.code for alarm in monitor.alarms}
    assert monitor.verdict == "healthy"


def test_weights_that_have_exploded_are_not_told_to_be_initialised_smaller() -> None:
    """Within the first steps, at a rate of 0.1: they began as usual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(30):
            x = torch.randn(64, 10)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1]))
    assert monitor.incidents[0].advice[0].startswith("Lower the learning rate: ")


def test_a_clip_that_has_held_a_single_batch_is_not_told_to_be_lower() -> None:
    """The run stays where it was; what the step did is to be looked at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    direction = torch.randn(10, 1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(300):
            x = torch.randn(64, 10)
            optimizer.zero_grad()
            output = model(x * (10 if number == 200 else 1))
            nn.functional.mse_loss(output, torch.tanh(x @ direction)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert monitor.verdict == "healthy"
    (incident,) = monitor.incidents
    assert incident.opened_step == 200
    assert "Lower the bound" not in advice(monitor)


def _notes_of_a_step(model: nn.Module) -> str:
    """What is noted in the first step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None)
    nn.functional.cross_entropy(model(torch.randn(8, 20)), torch.arange(8) % 3).backward()
    optimizer.step()
    monitor.detach()
    return " ".join(monitor.notes)


def _constant(*, biases: bool, dropout: float | None = None) -> nn.Module:
    between = nn.ReLU() if dropout is None else nn.Dropout(dropout)
    model = nn.Sequential(nn.Linear(20, 16), between, nn.Linear(16, 3))
    for name, one in model.named_parameters():
        if biases or "weight" in name:
            nn.init.constant_(one, 0.1)
    return model


def test_units_that_begin_alike_are_told_and_not_if_something_tells_them_apart() -> None:
    """The last layer alone, or biases or dropout that differ, leave units that learn different things."""
    told = _notes_of_a_step(_constant(biases=True))
    assert "each weight of 0.weight is 0.1, and each of 2.weight is 0.1: the 16 units between them are alike" in told
    assert "alike" not in _notes_of_a_step(_constant(biases=False))  # random biases
    assert "alike" not in _notes_of_a_step(_constant(biases=True, dropout=0.1))
    only_last = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(only_last[2].weight, 0.1)  # type: ignore[arg-type]
    assert "alike" not in _notes_of_a_step(only_last)


def test_a_clip_that_leaves_so_little_that_no_bit_changes_is_named_before_the_rate() -> None:
    """The rate is fine for the gradients as they come back."""
    model = mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(120):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
            optimizer.step()
    frozen = next(one for one in monitor.incidents if one.kind == "frozen")
    assert frozen.advice[0].startswith("Raise the bound of your own clip")


def test_updates_are_lost_in_float32_only_if_they_are_for_long() -> None:
    """The last step of a cosine schedule is as short, and no reason to say that the weights never change."""
    for annealed in (True, False):
        model = mlp(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.004)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        fallen = torch.optim.lr_scheduler.MultiStepLR(optimizer, [200], gamma=1e-6)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(400):
                step(optimizer, nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(0, 4, (32,))))
                (cosine if annealed else fallen).step()
        frozen = [one for one in monitor.incidents if one.kind == "frozen"]
        assert len(frozen) == (not annealed)
        if not annealed:
            assert 249 <= frozen[0].opened_step < 320
            assert "too small to change float32 weights" in frozen[0].evidence[0]


def test_a_learning_rate_below_zero_is_named_as_the_only_advice() -> None:
    """A linear schedule that runs past its end; it was called frozen, and then the batch was blamed."""
    model = mlp(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 100)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(250):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
            schedule.step()
    assert monitor.verdict != "healthy"
    for incident in monitor.incidents:
        assert incident.kind != "frozen"
        assert len(incident.advice) == 1
        assert "The learning rate was below zero at step 1" in incident.advice[0]


def test_a_binary_cross_entropy_below_zero_has_targets_that_are_none() -> None:
    """Labels of 1 and 2: the loss runs down for ever, and was healthy."""
    model = mlp(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(120):
            x = torch.randn(32, 8)
            labels = 1 + (x[:, :1] > 0).float()
            step(optimizer, nn.functional.binary_cross_entropy_with_logits(model(x), labels))
    (incident,) = monitor.incidents
    assert incident.open
    assert incident.advice[0].startswith("The binary cross-entropy is below zero: some targets are not between 0 and 1")


def test_a_loss_that_runs_down_slower_and_slower_is_not_resolved() -> None:
    """It has no floor, so that nothing brings it back to a level."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(600):
            optimizer.zero_grad()
            (model(torch.ones(1, 2)).sum() * 0 + 1 - (number / 20) ** 2).backward()
            optimizer.step()
    assert any(one.kind == "diverging" and one.open for one in monitor.incidents)


def test_steps_of_a_copy_in_place_of_the_model_are_told() -> None:
    """Forward and backward go on, and no step changes the model."""
    model = mlp(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(120):
            if number == 50:
                optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.01)
            step(optimizer, model(torch.randn(8, 8)).square().mean())
    assert any(note.startswith("since step 50, only an optimizer of other parameters") for note in monitor.notes)


def test_a_classifier_that_loses_what_it_had_learned_is_not_healthy() -> None:
    """Its weights fade bit by bit, so that no update stands out, until the loss is back at guessing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(500):
            x = torch.randn(32, 8)
            if 150 <= number < 250:  # the weights fade away
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.95)
            optimizer.param_groups[0]["lr"] = 0.1 if number < 250 else 1e-3
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
    assert monitor.verdict != "healthy"
    lost = [line for one in monitor.incidents for line in one.evidence if "(GW106)" in line]
    assert lost
    assert "most of what was learned is lost" in lost[0]


@pytest.mark.parametrize("cause", ["weight decay", "clip", "none"])
def test_a_loss_that_stalls_for_a_known_cause_is_no_notice(cause: str) -> None:
    """A model that was good from the start has neither lost its weights nor a clip that leaves nothing of its gradients."""
    torch.manual_seed(0)
    model = mlp(1)
    decay = 0.5 if cause == "weight decay" else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 if decay else 1e-6, momentum=0.9, weight_decay=decay)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2]).backward()
            if cause == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
            optimizer.step()
    stalled = next(one for one in monitor.incidents if one.kind == "stalled")
    assert stalled.severity == ("notice" if cause == "none" else "warning")
    assert (monitor.verdict == "healthy") == (cause == "none")
    words = {"weight decay": "Lower the weight decay", "clip": "Raise the bound of your own clip", "none": "Raise the"}
    assert stalled.advice[0].startswith(words[cause])
    assert ("nothing is wrong" in stalled.advice[0]) == (cause == "none")


def test_a_second_tower_has_gradients_of_a_scale_of_its_own() -> None:
    """Those of a critic's regression are hundreds of times as large as those of the actor beside it, which learns well."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"actor": mlp(4), "critic": mlp(1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(400):
            x = torch.randn(64, 8)
            loss = nn.functional.mse_loss(model["critic"](x), 30 * torch.randn(64, 1))
            step(optimizer, loss + nn.functional.cross_entropy(model["actor"](x), x[:, :4].argmax(1)))
    assert "vanishing" not in {one.kind for one in monitor.incidents}
    assert monitor.verdict == "healthy"


def test_a_rate_that_a_new_group_brings_is_told_with_its_number() -> None:
    """The suspect may be of a group whose own rate is as it was."""
    model = mlp(4, nn.ReLU)
    body, head = list(model.parameters())[:4], list(model.parameters())[4:]
    for parameter in body:
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(head, lr=0.01, momentum=0.9)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(300):
            if number == 200:
                for parameter in body:
                    parameter.requires_grad_(True)
                optimizer.add_param_group({"params": body, "lr": 10.0})
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
    told = advice(monitor)
    assert re.search(r"(was raised|has risen) from 0\.01 to 10 ", told)
    assert "from 0.01 to 0.01" not in told


def test_an_optimizer_for_each_step_is_told_once() -> None:
    """It was taken for a new task at each of them."""
    model = mlp(1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(60):
            x = torch.randn(64, 8)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1]))
    assert [note for note in monitor.notes if "optimizer" in note] == [
        "the program has made 8 optimizers for 9 steps: each begins without momentum, and without the averages of Adam. Make one "
        "before the loop."
    ]


def test_a_rate_to_try_leaves_room_for_the_momentum() -> None:
    """It adds up earlier updates, whose directions differ."""
    found = {}
    for momentum in (0.0, 0.9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0, momentum=momentum)
        with gradwatch.attach(model, report=None, strict=True) as monitor:
            for _ in range(40):
                x = torch.randn(64, 8)
                step(optimizer, nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
        line = next(line for line in monitor.incidents[0].advice if "instead of 10" in line)
        found[momentum] = float(line.split(": ")[1].split()[0])
    assert found[0.9] == pytest.approx(found[0.0] * math.sqrt(1 - 0.9**2), rel=0.15)


def _steps_of(losses: list[Callable[[torch.Tensor], torch.Tensor]], each: int, model: nn.Module) -> gradwatch.Monitor:
    """Train by one loss after the other, each for so many steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for loss in losses:
            for _ in range(each):
                x = torch.randn(32, 8)
                step(optimizer, loss(x))
    return monitor


def test_what_is_known_of_a_loss_is_forgotten_once_it_is_another_one() -> None:
    """A policy gradient that follows on cloning is below zero, and no cross-entropy."""
    model = mlp(1)

    def clone(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(x), (x[:, :1] > 0).float())

    def reinforce(x: torch.Tensor) -> torch.Tensor:
        policy = torch.distributions.Bernoulli(logits=model(x))
        action = policy.sample()
        reward = (action == (x[:, :1] > 0)).float()
        objective: torch.Tensor = (policy.log_prob(action) * reward).mean()
        return objective

    monitor = _steps_of([clone, reinforce], 150, model)
    assert monitor.history.loss(last=32).max() < 0
    assert not any("cross-entropy" in note for note in monitor.notes)
    assert monitor.verdict == "healthy"
    assert not monitor.history.sees_loss


def test_a_cross_entropy_among_ever_more_classes_is_not_measured_by_the_first() -> None:
    """Contrastive pairs: each batch has as many classes as rows."""
    torch.manual_seed(0)
    model = mlp(16)

    def contrast(rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def loss(_: torch.Tensor) -> torch.Tensor:
            x = torch.randn(rows, 8)
            a, b = model(x), model(x + torch.randn_like(x))
            return nn.functional.cross_entropy(a @ b.T / 4, torch.arange(rows))

        return loss

    monitor = _steps_of([contrast(4), contrast(128)], 300, model)
    assert monitor.history.loss(last=32).mean() > math.log(4)
    assert [one for one in monitor.incidents if one.severity != "notice"] == []


def test_optimizers_that_a_program_makes_once_are_no_mistake() -> None:
    """One for each layer, and one of other tensors that steps many times in between."""
    model = mlp(1)
    optimizers = [torch.optim.Adam(layer.parameters(), lr=1e-3) for layer in model if list(layer.parameters())]
    noise = nn.Parameter(torch.zeros(32, 8))
    inner = torch.optim.SGD([noise], lr=0.1)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(20):
            x = torch.randn(32, 8)
            for _ in range(40):  # an adversary
                inner.zero_grad()
                (-nn.functional.mse_loss(model(x + noise), x[:, :1])).backward()
                inner.step()
            model.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :1]).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert not any("optimizer" in note for note in monitor.notes)


def test_layers_beside_each_other_may_begin_alike() -> None:
    """Two linear maps of the whole input, as of a trend and of what is left."""
    model = nn.ModuleDict({"trend": nn.Linear(16, 16), "rest": nn.Linear(16, 16), "scale": nn.Linear(16, 16)})
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1 / 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        x = torch.randn(8, 16)
        step(optimizer, (sum(layer(x) for layer in model.values()) - torch.randn(8, 16)).square().mean())
    assert not any("alike" in note for note in monitor.notes)


@pytest.mark.parametrize("seed", [1, 8, 14])
def test_a_first_loss_that_was_high_by_chance_does_not_make_a_run_learned(seed: int) -> None:
    """Each ends where the best constant does; the losses of single batches differ by more than it has come down."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.2)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(40, 9)
            optimizer.zero_grad()
            y = torch.stack([x[:, 0] * 2 - x[:, 1], x[:, 2].abs()], 1)
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert monitor.verdict != "healthy"
    assert "the loss is 2." in monitor.incidents[0].left[0]


@pytest.mark.parametrize("scheduler", ["warm-up", "one cycle"])
def test_a_rate_that_warms_up_is_told_with_the_one_that_was_set(scheduler: str) -> None:
    """The user knows of 3.0, and not of what a warm-up had reached."""
    torch.manual_seed(0)
    model, way = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(16, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0)
    rates = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 3.0, 400)
        if scheduler == "one cycle"
        else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    )
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(60):
            x = torch.randn(64, 16)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x @ way).argmax(1)).backward()
            optimizer.step()
            rates.step()
    assert "on its way to 3" in monitor.incidents[0].advice[0]


@pytest.mark.parametrize("since", [0, 200])
def test_inputs_that_are_all_zero_are_named_and_not_the_weights(since: int) -> None:
    """The gradient of the first bias is there, and that of its weights is exactly zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(since + 100):
            x = torch.randn(64, 8)
            step(optimizer, nn.functional.cross_entropy(model(x * (number < since)), x[:, :5].argmax(1)))
    dead = next(incident for incident in monitor.incidents if incident.kind == "dead")
    assert dead.advice == (
        "Look at what 0 gets: its inputs are all zero, since 0.bias has a gradient and 0.weight has none. It may be the data, a "
        "mask, or the layer before.",
    )
