"""Small trainings that show what public bug reports were about, each with the answer that its reporter needed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import gradwatch


def mlp(outputs: int = 1) -> nn.Sequential:
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, outputs))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def advice(monitor: gradwatch.Monitor) -> str:
    """All advice of the first incident."""
    return " ".join(monitor.incidents[0].advice)


@pytest.mark.parametrize("clip", [None, "norm"])
def test_an_explosion_of_all_layers_in_one_step_opens_in_that_step_though_the_loss_is_as_ever(clip: str | None) -> None:
    """Before the update is made; a clip holds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, clip=clip, strict=True) as monitor:
        for number in range(100):
            x = torch.randn(32, 8)
            hidden = model[:4](x)
            loss = nn.functional.mse_loss(model[4](hidden), x[:, :1] + x[:, 1:2])
            if number == 60:
                loss = loss + 1e6 * ((hidden - hidden.detach()) * torch.randn(32, 32)).mean()  # its value is zero
            step(optimizer, loss)
        assert monitor.incidents[0].kind == "exploding"
        assert monitor.incidents[0].opened_step == 60
        assert monitor.verdict == ("confirmed" if clip is None else "healthy")
        assert (loss.item() < 0.1) == (clip is not None)


def test_infinity_that_came_first_is_no_explosion_though_another_head_surges() -> None:
    """The suspect is the head whose loss overflowed, and both advices stay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(8, 16), "mean": nn.Linear(16, 4), "variance": nn.Linear(16, 4)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True, forensics=False) as monitor:
        for number in range(80):
            x = torch.randn(32, 8)
            x[0] *= 3000 if number == 60 else 1
            h = nn.functional.relu(model["body"](x))
            fit = (model["mean"](h) - x[:, :4]).abs().mean()
            step(optimizer, fit + (model["variance"](h).exp() - model["variance"](h)).mean())
        incident = monitor.incidents[0]
        assert (incident.kind, incident.opened_step, incident.phase) == ("nonfinite", 60, "loss")
        assert (incident.suspect or "").startswith("variance")
        assert "exp of a large number" in advice(monitor)
        assert "learning rate" in advice(monitor)


def test_nan_between_the_output_and_the_loss_is_looked_for_there() -> None:
    """Missing targets that are masked after the square."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, module in {"body": nn.Linear(8, 16), "act": nn.ReLU(), "head": nn.Linear(16, 3)}.items():
        model.add_module(name, module)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(31):
            x = torch.randn(32, 8)
            y = x[:, :3].clone()
            if number == 30:
                y[0, 0] = torch.nan
            step(optimizer, (model(x) - y).square()[~y.isnan()].mean())
        assert monitor.incidents[0].kind == "nonfinite"
        assert "behind head, between its output and the loss: NaN in the targets" in advice(monitor)


@pytest.mark.parametrize("clip", [None, "norm"])
def test_a_mean_over_no_label_is_a_notice(clip: str | None) -> None:
    """The loss is NaN, every gradient is zero, nothing is changed, and nothing is said to have helped."""
    model = mlp(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, clip=clip, strict=True) as monitor:
        for number in range(120):
            x = torch.randn(32, 8)
            y = x[:, :5].argmax(1) if number != 50 else torch.full((32,), -100)
            step(optimizer, nn.functional.cross_entropy(model(x), y))
        (incident,) = monitor.incidents
        assert (incident.kind, incident.severity, incident.verdict) == ("nonfinite", "notice", "resolved")
        assert "took no harm" in advice(monitor)
        assert incident.clip is None
        assert monitor.verdict == "healthy"


def test_a_rate_of_zero_in_every_group_is_frozen() -> None:
    """A schedule that ends at zero while the training goes on."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(300):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1]))
            schedule.step()
        (incident,) = monitor.incidents
        assert incident.kind == "frozen"
        assert incident.advice == ("The learning rate of every group has been 0 since step 100: check the scheduler.",)
        assert monitor.verdict == "suspected"


def test_layers_that_an_optimizer_holds_and_no_gradient_reaches_are_noted() -> None:
    """Once, by name."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(200):
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model[2](model[1](model[0](x)).detach()), x[:, :1]))
        assert sum("no gradient has reached 0.weight, 0.bias in" in note for note in monitor.notes) == 1


def test_the_users_own_clip_is_no_advice() -> None:
    """It is there already; the rate is named with a number to try."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(120):
            x = torch.randn(32, 8)
            y = x[:, :1] * (40 if number >= 60 else 1) + (40 if number >= 60 else 0) * x[:, 1:2]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        assert "attach(model, clip=" not in advice(monitor)
        assert "instead of 0.5" in advice(monitor)


def test_a_forward_pass_that_overflows_float16_is_named_under_a_scaler() -> None:
    """No loss scale can help, and skipping is what the scaler does already."""
    model = mlp(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(80):
            x = torch.randn(32, 8)
            with torch.autocast("cpu", dtype=torch.float16):
                out = model(x)
                out = (out * (1e4 if number >= 40 else 1.0) * 1e4).float() / 1e4
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(out - out.mean(), x[:, :5].argmax(1))).backward()
            scaler.step(optimizer)
            scaler.update()
        assert monitor.incidents[0].kind == "nonfinite"
        first = monitor.incidents[0].advice[0]  # of the operation where it is found, else of the pass
        assert "float16" in first
        assert "use bfloat16" in first.lower()
        assert "attach(model, clip=" not in advice(monitor)


def test_cross_entropy_over_token_ids_is_not_advised_to_scale_targets_or_inputs() -> None:
    """A language model with norms is not told to add them either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.LayerNorm(16), nn.Linear(16, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for _ in range(150):
            tokens = torch.randint(32, (64,))
            step(optimizer, nn.functional.cross_entropy(1e3 * model(tokens), (tokens + 1) % 32))
        told = " ".join(line for incident in monitor.incidents for line in incident.advice)
        assert told
        for never in ("Scale the targets", "Scale the inputs", "Add normalisation", "ReLU"):
            assert never not in told


def test_a_clip_after_the_step_is_the_first_advice_on_an_explosion() -> None:
    """What is known comes first."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(150):
            x = torch.randn(32, 8)
            y = x[:, :1] + (100 if number >= 120 else 0) * (x[:, 1:2] > 2)
            step(optimizer, nn.functional.mse_loss(model(x), y))
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert monitor.incidents[0].advice[0].startswith("Your clip comes after optimizer.step()")


def test_a_clip_before_unscaling_is_the_first_advice_on_a_loss_that_stalls() -> None:
    """And the norms are those without the loss scale."""
    model = mlp(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(320):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))).backward()
            if number == 0:
                true = (
                    sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5 / 65536
                )
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert monitor.history.global_norm()[0] == pytest.approx(true, rel=1e-5)
        assert monitor.incidents[0].kind == "stalled"
        assert "Your clip comes before scaler.unscale_(optimizer)" in monitor.incidents[0].advice[0]


def one_odd_row(
    *, watched: str | gradwatch.AutoClip | None, bound: float = float("inf")
) -> tuple[gradwatch.Monitor, float]:
    """Train by Adam with one target of 1e5 at step 150; return the monitor and the last loss."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    with gradwatch.attach(model, report=None, clip=watched, strict=True) as monitor:
        for number in range(600):
            x = torch.randn(32, 8, generator=generator)
            y = x[:, :1] - x[:, 1:2]
            if number == 150:
                y[0] = 1e5
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if bound < float("inf"):
                nn.utils.clip_grad_norm_(model.parameters(), bound)
            optimizer.step()
    return monitor, loss.item()


def test_an_odd_batch_under_adam_is_repaired_by_the_clip_that_is_advised() -> None:
    """Without it Adam makes short steps for long; the rate is not blamed."""
    monitor, unclipped = one_odd_row(watched=None)
    (incident,) = monitor.incidents
    assert (incident.kind, incident.severity, incident.opened_step) == ("spike", "notice", 150)
    assert "learning rate" not in advice(monitor)
    bound = re.search(r"clip each step to a norm of ([0-9.]+), twice what is usual here", advice(monitor))
    assert bound
    _, clipped = one_odd_row(watched=None, bound=float(bound[1]))
    assert clipped < 0.1 * unclipped


def test_auto_clip_leaves_a_single_odd_batch_alone_unless_it_is_to_act_on_spikes() -> None:
    """What looks like one may be a rare signal; the advice says how to change that, and that it helps."""
    monitor, alone = one_odd_row(watched="norm")
    assert monitor.incidents[0].clip is None
    assert 'AutoClip("norm", when="spike")' in advice(monitor)
    monitor, treated = one_odd_row(watched=gradwatch.AutoClip("norm", when="spike"))
    assert monitor.incidents[0].clip is not None
    assert monitor.incidents[0].clip.clipped == 1
    assert treated < 0.1 * alone


@pytest.mark.parametrize("clip", [None, "norm"])
def test_a_batch_with_nan_and_an_outlier_soon_after_are_two_incidents(clip: str | None) -> None:
    """Each with its own advice: the rate is no cause of a NaN in the targets."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, clip=clip, strict=True) as monitor:
        for number in range(200):
            x = torch.randn(32, 8)
            y = x[:, :1] - x[:, 1:2]
            if number in (80, 100):
                y[0] = torch.nan if number == 80 else 300.0
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if number == 80 and clip is None:
                optimizer.zero_grad()  # as a loop does that leaves out a loss of NaN
            optimizer.step()
        first, second = monitor.incidents
        assert (first.kind, first.opened_step, first.closed_step, first.verdict) == ("nonfinite", 80, 100, "resolved")
        assert (second.kind, second.opened_step) == ("exploding", 100)
        assert "rate" not in " ".join(first.advice)
        assert "target" in str(first)
        assert second.advice[0].startswith("Look at the batch of step 100")
        if clip is not None:
            assert first.clip is not None
            assert second.clip is not None
            assert (first.clip.skipped, first.clip.clipped, first.clip.recovered_after) == (1, 0, 1)
            assert (second.clip.skipped, second.clip.clipped) == (0, 1)


def test_an_explosion_that_ends_in_nan_is_one_incident() -> None:
    """Growth that becomes infinite has one cause."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        for number in range(90):
            if number == 60:
                optimizer.param_groups[0]["lr"] = 5.0
            x = torch.randn(32, 8)
            step(optimizer, nn.functional.mse_loss(model(x), x[:, :1] - x[:, 1:2]))
        (incident,) = monitor.incidents
        assert incident.kind == "exploding"
