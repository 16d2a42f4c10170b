"""Auto-clip on real trainings: in time, in bounds, for real, and off again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.trainings import data, mlp, train


def exploding(
    clip: Any, steps: int = 60, at: int = 30, factor: float = 1e4, lasts: int = 6
) -> tuple[gradwatch.Monitor, list[list[Tensor]]]:
    """Train with SGD; for a few steps the loss is ``factor`` times as large. Return what the optimizer saw."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    )
    step = iter(range(steps))

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        wild = at <= next(step) < at + lasts
        return nn.functional.mse_loss(output, target) * (factor if wild else 1.0)

    with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
        train(model, optimizer, steps, loss_of=loss_of)
    return monitor, seen


def norm(gradients: list[Tensor]) -> float:
    """Return the global norm."""
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def test_the_gradients_of_the_very_step_are_clipped_by_norm() -> None:
    """The optimizer sees norm 1.0 on the step on which the incident opens, and whole gradients before it."""
    monitor, seen = exploding("norm")
    incident = monitor.incidents[0]
    assert (incident.kind, incident.opened_step) == ("exploding", 30)
    assert norm(seen[30]) == pytest.approx(1.0, rel=1e-4)
    assert norm(seen[29]) == pytest.approx(monitor.history.global_norm()[29], rel=1e-6)
    coefficients = monitor.history.clip_coefficient()
    assert coefficients[29] == 1.0
    assert coefficients[30] == pytest.approx(1.0 / monitor.history.global_norm()[30], rel=1e-3)


def test_the_gradients_of_the_very_step_are_clipped_by_value() -> None:
    """No element above 0.5."""
    monitor, seen = exploding("value")
    assert monitor.incidents[0].opened_step == 30
    assert max(g.abs().max().item() for g in seen[30]) == pytest.approx(0.5)
    assert monitor.history.clip_coefficient()[30] == pytest.approx(
        norm(seen[30]) / monitor.history.global_norm()[30], rel=1e-4
    )


def test_it_lets_go_after_the_hold_and_says_whether_it_helped() -> None:
    """Armed again, the coefficient back at 1.0, the incident closed with the record of what was done."""
    monitor, seen = exploding(gradwatch.AutoClip("norm", hold=10), steps=120)
    incident = monitor.incidents[0]
    assert incident.verdict == "resolved"
    assert incident.clip is not None
    assert incident.clip.released_step == incident.closed_step
    assert incident.clip.helped is True
    assert incident.clip.clipped >= 6
    assert "it helped" in str(incident.clip)
    assert incident.closed_step is not None
    assert monitor.history.clip_coefficient()[incident.closed_step :].tolist() == [1.0] * (120 - incident.closed_step)
    assert norm(seen[-1]) == pytest.approx(monitor.history.global_norm()[-1], rel=1e-6)


def test_watching_only_never_touches_a_gradient() -> None:
    """The same explosion, the optimizer sees it whole."""
    monitor, seen = exploding(None)
    assert monitor.incidents
    assert norm(seen[30]) == pytest.approx(monitor.history.global_norm()[30], rel=1e-6)


def test_only_the_configured_kinds_switch_it_on() -> None:
    """With `when="nonfinite"` a finite explosion is only watched."""
    monitor, _ = exploding(gradwatch.AutoClip("norm", when="nonfinite"), factor=50.0)
    assert monitor.incidents
    assert set(monitor.history.clip_coefficient()) == {1.0}


def test_always_is_ordinary_clipping_with_telemetry() -> None:
    """Bit-identical to torch's own clip on each step, within 1e-6."""

    def run(own: bool) -> list[Tensor]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clip = None if own else gradwatch.AutoClip(gradwatch.ClipNorm(0.1), when="always")
        with gradwatch.attach(model, clip=clip, report=None, strict=True):
            train(model, optimizer, 30, each=lambda _: own and nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        return [parameter.detach() for parameter in model.parameters()]

    for mine, theirs in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def poisoned(
    clip: Any, bad: set[int], name: str = "AdamW", steps: int = 40, **settings: Any
) -> tuple[gradwatch.Monitor, list[Any]]:
    """Train with NaN in the inputs of the steps in ``bad``; return parameters and optimizer state after each step."""
    model = mlp()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **settings)
    x, y = data()
    states = []
    with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x * (float("nan") if step in bad else 1.0)), y)
            loss.backward()
            optimizer.step()
            kept = [p.detach().clone() for p in model.parameters()]
            for state in optimizer.state.values():
                kept += [torch.as_tensor(value).clone() for value in state.values() if value is not None]
            states.append(kept)
            assert all(parameter.grad is not None for parameter in model.parameters())
    return monitor, states


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {}),
        ("AdamW", {"fused": True}),
        ("Adam", {"foreach": True}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {}),
    ],
)
def test_a_step_with_nan_is_skipped_for_real(name: str, settings: dict[str, Any]) -> None:
    """Parameters and optimizer state stay bit-identical over the skipped step; the next step goes on."""
    monitor, states = poisoned("norm", {20}, name, **settings)
    for before, after in zip(states[19], states[20], strict=True):
        assert torch.equal(before, after)
    assert not all(torch.equal(one, other) for one, other in zip(states[20], states[21], strict=True))
    assert np.flatnonzero(monitor.history.skipped()).tolist() == [20]
    incident = monitor.incidents[0]
    assert (incident.kind, incident.severity, incident.phase) == ("nonfinite", "critical", "loss")
    assert incident.clip is not None
    assert incident.clip.skipped == 1


def test_too_many_skips_in_a_row_stop_the_run_with_the_cause() -> None:
    """After the cap `TrainingUnstableError`, parameters still those before the first skipped step."""
    with pytest.raises(
        gradwatch.TrainingUnstableError, match=r"not finite at step 15 .*5 steps skipped in a row of at most 5"
    ):
        poisoned(gradwatch.AutoClip("norm", max_skips=5), set(range(10, 40)))


def test_skips_that_are_not_in_a_row_do_not_stop_the_run() -> None:
    """The counter starts anew with each finite step."""
    monitor, _ = poisoned(gradwatch.AutoClip("norm", max_skips=2), {10, 11, 13, 14, 16, 17})
    assert monitor.history.skipped().sum() == 6


def test_stop_stops_at_the_first_step_that_is_not_finite() -> None:
    """For those who would rather look."""
    with pytest.raises(gradwatch.TrainingUnstableError, match="not finite at step 10"):
        poisoned(gradwatch.AutoClip("norm", on_nonfinite="stop"), {10})


def test_ignore_lets_the_step_happen() -> None:
    """NaN reaches the weights, and nothing is scaled by NaN before."""
    monitor, states = poisoned(gradwatch.AutoClip("norm", on_nonfinite="ignore"), {10}, steps=12)
    assert not monitor.history.skipped().any()
    assert any(value.isnan().any() for value in states[11])


def test_huge_finite_gradients_are_clipped_in_their_direction() -> None:
    """A norm that overflows float32 is measured again, not skipped."""
    monitor, seen = exploding("norm", factor=1e25, lasts=1)
    assert 1e20 < monitor.history.global_norm()[30] < 1e30
    assert norm(seen[30]) == pytest.approx(1.0, rel=1e-4)
    assert not monitor.history.skipped().any()


def test_a_clip_that_still_bites_is_let_go_by_degrees() -> None:
    """A lasting higher level: the bounds widen step by step until they bite no more."""
    monitor, seen = exploding(gradwatch.AutoClip("norm", hold=10), steps=250, factor=30.0, lasts=250)
    norms = [norm(gradients) for gradients in seen]
    incident = monitor.incidents[0]
    assert incident.closed_step is not None
    clipped = np.flatnonzero(monitor.history.clip_coefficient() < 1)
    bounds = np.array(norms)[clipped]
    assert bounds[:10] == pytest.approx([1.0] * 10, rel=1e-3)
    assert bounds[-1] > 1.5
    assert (np.diff(np.log(bounds)) <= np.log(1.031) * np.diff(clipped)).all()
