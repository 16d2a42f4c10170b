"""Auto-clip on real trainings: in time, in bounds, for real, and off again."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.history.typical_norm import typical_norm
from tests.clipping import lived
from tests.trainings import data, mlp, train


def exploding(
    clip: Any,
    steps: int = 60,
    at: int = 30,
    factor: float = 1e4,
    lasts: int = 6,
    rate: float = 0.01,
    *,
    inside: bool = False,
) -> tuple[gradwatch.Monitor, list[list[Tensor]]]:
    """Train with SGD; for a few steps the loss is ``factor`` times as large, or, ``inside``, the gradients alone are.

    Return what the optimizer saw.
    """
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    seen: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    )
    step = iter(range(steps))

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        wild = at <= next(step) < at + lasts
        if wild and inside:
            output.register_hook(lambda gradient: gradient * factor)
        return nn.functional.mse_loss(output, target) * (factor if wild and not inside else 1.0)

    with gradwatch.attach(model, clip=clip, report=None, strict=True) as monitor:
        train(model, optimizer, steps, loss_of=loss_of)
    return monitor, seen


def norm(gradients: list[Tensor]) -> float:
    """Return the global norm."""
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def test_the_gradients_of_the_very_step_are_clipped_by_norm() -> None:
    """The optimizer sees norm 1.0 on the step on which the incident opens, and whole gradients before it."""
    monitor, seen = exploding(gradwatch.ClipNorm(1.0))
    incident = monitor.incidents[0]
    assert (incident.kind, incident.opened_step) == ("exploding", 30)
    assert norm(seen[30]) == pytest.approx(1.0, rel=1e-4)
    assert norm(seen[29]) == pytest.approx(monitor.history.global_norm()[29], rel=1e-6)
    coefficients = monitor.history.clip_coefficient()
    assert coefficients[29] == 1.0
    assert coefficients[30] == pytest.approx(1.0 / monitor.history.global_norm()[30], rel=1e-3)


def test_the_gradients_of_the_very_step_are_clipped_by_value() -> None:
    """No element above 0.5."""
    monitor, seen = exploding(gradwatch.ClipValue(0.5))
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
        gradwatch.TrainingUnstableError, match=r"not finite at step 15 .*, after 5 steps in a row .* of at most 5:"
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
    monitor, seen = exploding(gradwatch.ClipNorm(1.0), factor=1e25, lasts=1)
    assert 1e20 < monitor.history.global_norm()[30] < 1e30
    assert norm(seen[30]) == pytest.approx(1.0, rel=1e-4)
    assert not monitor.history.skipped().any()


def test_a_clip_that_still_bites_is_let_go_by_degrees() -> None:
    """A lasting higher level: the bounds widen step by step until they bite no more."""
    policy = gradwatch.AutoClip(gradwatch.ClipNorm(1.0), hold=10)
    monitor, seen = exploding(policy, steps=400, factor=80.0, lasts=400, rate=3e-4, inside=True)
    norms = [norm(gradients) for gradients in seen]
    incident = monitor.incidents[0]
    assert incident.closed_step is not None
    clipped = np.flatnonzero(monitor.history.clip_coefficient() < 1)
    bounds = np.array(norms)[clipped]
    assert bounds[:10] == pytest.approx([1.0] * 10, rel=1e-3)
    assert bounds[-1] > 1.5
    assert (np.diff(np.log(bounds)) <= np.log(1.031) * np.diff(clipped)).all()


def test_a_release_that_raises_the_loss_is_taken_back() -> None:
    """Each step goes in a random direction, so that longer ones keep the loss higher: the clip has to stay."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.zeros(64))])
    (weights,) = model.parameters()
    optimizer = torch.optim.SGD([weights], lr=0.05)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.zeros(64) if weights.grad is None else weights.grad.clone())
    )
    policy = gradwatch.AutoClip(gradwatch.ClipNorm(2.0), hold=10)
    with gradwatch.attach(model, clip=policy, report=None, strict=True):
        for step in range(300):
            optimizer.zero_grad()
            ((weights**2).sum() / 2 + 1000).backward()
            assert weights.grad is not None
            weights.grad += torch.randn(64) * (0.1 if step < 40 else 20.0)
            optimizer.step()
    norms = [norm([gradient]) for gradient in seen]
    assert max(norms[60:]) > 4.0, "the bounds were widened"
    assert norms[-1] == pytest.approx(2.0), "and restored, though the loss is within a tenth of its level"


# Thresholds.


@pytest.mark.parametrize(("threshold", "times"), [("auto", 2.0), (5.0, 5.0), (0.5, 0.5)])
def test_the_threshold_is_taken_from_the_runs_own_norms(threshold: Any, times: float) -> None:
    """So many times the median of the norms before the incident."""
    monitor, seen = exploding(gradwatch.AutoClip("norm", threshold=threshold))
    typical = float(np.median(monitor.history.global_norm()[:30]))
    assert norm(seen[30]) == pytest.approx(times * typical, rel=1e-3)
    assert monitor.incidents[0].clip is not None
    assert f"max_norm={times * typical:.4g}" in str(monitor.incidents[0].clip)


def test_the_typical_norm_is_that_of_the_calmest_stretch() -> None:
    """Of a run whose norms fall it is the newest, of one whose norms already grow the one before; NaN is left out."""
    falling, growing = (np.geomspace(*ends, 128) for ends in ((8.0, 0.5), (0.5, 8.0)))
    for norms, calm in ((falling, falling[96:]), (growing, growing[:32])):
        history, _ = lived([(value, 0.0, 0.0) for value in [*norms, math.nan, 1e9]])
        assert typical_norm(history.global_norm()[:-1]) == pytest.approx(float(np.median(calm)), rel=0.1)
    assert math.isnan(typical_norm(lived([(1.0, 0.0, 0.0)] * 15)[0].global_norm()))


def test_a_young_run_keeps_the_clips_own_bounds() -> None:
    """After four steps nothing is typical: the norm is 1.0."""
    monitor, seen = exploding("norm", steps=12, at=4, factor=1e6, lasts=2)
    assert monitor.incidents[0].opened_step <= 5
    assert norm(seen[5]) == pytest.approx(1.0, rel=1e-4)


def test_an_automatic_threshold_goes_down_where_steps_are_too_long() -> None:
    """From 2 to 0.5 times the typical norm and no lower; not where steps are short, however high the loss."""
    left = too_fast((), 250, "SGD")["monitor"]
    before = left.history.global_norm()[:41]
    typical = float(np.median(before))
    outside = np.split(before, np.flatnonzero(before <= 2 * typical))  # each excursion, behind the norm before it
    peaks = sorted(float(norms[1:].max()) for norms in outside[1:-1] if len(norms) > 1)
    first, record = float(f"{max(2 * typical, peaks[-3]):.4g}"), left.incidents[0].clip
    assert record.clip == f"ClipNorm(max_norm={first / 4})"
    assert f": ClipNorm(max_norm={first}), narrowed to {record.clip} by step {record.narrowed_step}, clipped" in str(
        left.summary()
    )
    assert f"auto-clip last set to {record.clip}: " in str(left.summary())
    lengths, steps = left.history.clip_coefficient() * left.history.global_norm(), left.history.steps()
    narrow = lengths[(steps >= record.narrowed_step) & (steps < record.narrowed_step + 99)]
    wide = lengths[(steps >= record.from_step) & (steps < record.narrowed_step)]
    assert wide.max() == pytest.approx(4 * narrow.max(), rel=1e-3)  # the bound, or less where the step would overshoot
    assert wide.min() == pytest.approx(2 * narrow.max(), rel=1e-3)
    monitor, seen = exploding(gradwatch.AutoClip("norm", patience=10), steps=80, lasts=80)
    typical = float(np.median(monitor.history.global_norm()[:30]))
    assert [norm(gradients) / typical for gradients in seen[30:]] == pytest.approx([2.0] * 50, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": 0.1}, r"AutoClip\(threshold.*0.5 to 10 times"),
        ({"threshold": 20}, "0.5 to 10 times"),
        ({"clip": "percentile", "threshold": 2.0}, "has no bound that a threshold could set"),
        ({"threshold": 2.0, "when": "always"}, "applied when an incident opens"),
        ({"escalate": ("stop", "rate")}, "'stop' as the last"),
        ({"escalate": ("rate", "rate")}, "each measure once"),
        ({"escalate": ("rewind",)}, "rewind"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    """With the value and what was expected."""
    with pytest.raises(gradwatch.UsageError, match=said):
        gradwatch.AutoClip(**{"clip": "norm", **settings})


# Going further, and what is said of it.


def too_fast(escalate: tuple[str, ...], steps: int = 150, name: str = "SGD") -> dict[str, Any]:
    """Train at a rate that is thousands of times too high from step 40 on; return what became of it."""
    model = mlp(depth=4)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.02 if name == "SGD" else 1e-3)
    used: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    held: list[float] = []

    def schedule(step: int) -> None:
        if step == 40:
            optimizer.param_groups[0]["lr"] *= 3000 if name == "SGD" else 5000
        held.append(optimizer.param_groups[0]["lr"])

    policy = gradwatch.AutoClip("norm", patience=10, escalate=escalate)
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        losses = train(model, optimizer, steps, each=schedule)
    return {"monitor": monitor, "losses": losses, "used": used, "held": held}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_rate_is_lowered_only_if_allowed_and_each_step_of_it_is_told(name: str) -> None:
    """The optimizer steps with the lowered rate; between steps the user's own stands, as schedulers need it."""
    left = too_fast((), 250, name)
    assert set(left["held"]) == {left["held"][0], left["held"][-1]}
    assert set(left["used"]) == set(left["held"])
    lowered = too_fast(("rate",), 250, name)
    assert lowered["held"] == left["held"]
    factors = np.array(lowered["used"]) / np.array(lowered["held"])
    assert set(factors) <= {1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625}
    assert min(factors) <= 0.5
    assert (np.diff(factors) <= 0).all()
    notes = [note for note in lowered["monitor"].notes if "learning rate x" in note]
    assert len(notes) == len(set(factors)) - 1
    record = lowered["monitor"].incidents[0].clip
    assert record.measures[0] == f"learning rate x 0.5 from step {int(np.argmin(factors == 1.0))} on"
    assert record.measures[0] in str(record)
    if name == "SGD":  # AdamW has undone by then what was learned, with its first steps at that rate
        assert np.median(lowered["losses"][-20:]) < np.median(left["losses"][-20:])


def test_a_permanent_fault_ends_in_the_documented_stop_within_the_cap() -> None:
    """Skip, stop: each after its patience, with finite parameters and the reason."""
    policy = gradwatch.AutoClip("norm", patience=10, escalate=("skip", "stop"), max_skips=5)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = iter(range(300))

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target) * (1e4 if next(step) >= 30 else 1.0)

    said = pytest.raises(gradwatch.TrainingUnstableError, match=r"has not helped for 10 steps.*go back to a checkpoint")
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor, said:
        train(model, optimizer, 300, loss_of=loss_of)
    assert next(step) - 1 <= 30 + 5 * 10  # a first look, the skips, the stop
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    skipped = "".join("s" if one else "." for one in monitor.history.skipped())
    assert max(map(len, skipped.split("."))) == 5
    assert "left out from step" in monitor.notes[0]


def test_under_adam_the_advice_says_that_clipping_cannot_help() -> None:
    """Whatever was allowed: such an optimizer divides gradients by their own size."""
    advice = " ".join(too_fast((), name="AdamW", steps=80)["monitor"].incidents[0].advice)
    assert "A clip does not repair a rate that is too high for long, because AdamW divides" in advice


def test_the_record_tells_what_was_done_and_what_came_of_it() -> None:
    """Counted again by plain loops over the history."""
    monitor, seen = exploding(gradwatch.AutoClip("norm", hold=10), steps=120)
    record = monitor.incidents[0].clip
    assert record is not None
    assert record.released_step is not None
    history = monitor.history
    coefficients = history.clip_coefficient()[record.from_step : record.released_step]
    assert record.clipped == np.count_nonzero(coefficients < 1)
    assert record.share == pytest.approx(record.clipped / (record.released_step - record.from_step), abs=0.05)
    largest = int(np.argmax(history.global_norm()))
    assert record.norm_before == pytest.approx(history.global_norm()[largest])
    assert record.norm_after == pytest.approx(norm(seen[largest]), rel=1e-4)
    assert record.loss_before == pytest.approx(np.median(history.loss()[: record.from_step]), rel=0.1)
    back = record.from_step + (record.recovered_after or 0)
    assert history.loss()[back - 1] > 1.1 * record.loss_before
    assert f"back at its level after {record.recovered_after} steps" in str(record)
    assert str(record).endswith(f"released at step {record.released_step}: it helped")


# Skipping.

EVERY = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"]


@pytest.mark.parametrize("name", EVERY)
def test_a_skip_leaves_every_optimizer_of_torch_as_it_was(name: str) -> None:
    """Parameters and state to the bit, the evaluations that LBFGS counts among them."""
    model: nn.Module = nn.EmbeddingBag(10, 4, sparse=True) if name == "SparseAdam" else mlp()
    owned = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    optimizer = getattr(torch.optim, name)(owned, lr=0.01)
    x, y = data()
    bags = torch.tensor([[1, 2, 3], [2, 2, 5]])

    def closure(factor: float) -> Tensor:
        optimizer.zero_grad()
        loss = model(bags).pow(2).sum() if name == "SparseAdam" else nn.functional.mse_loss(model(x), y)
        (loss * factor).backward()
        return loss

    def kept() -> Any:
        return [copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())]

    with gradwatch.attach(model, clip="norm", report=None, strict=True) as monitor:
        for step in range(8):
            before = kept()
            optimizer.step(lambda step=step: closure(math.nan if step == 5 else 1.0))
            same = repr(before) == repr(kept()) and all(
                torch.equal(one, other)
                for one, other in zip(before[0].values(), model.state_dict().values(), strict=True)
            )
            if step == 5:
                torch.testing.assert_close(kept(), before, rtol=0, atol=0)
            elif name != "LBFGS":  # which may have come to its end
                assert not same
    assert np.flatnonzero(monitor.history.skipped()).tolist() == [5]


def test_what_a_clip_does_all_the_time_is_told_in_a_note() -> None:
    """GW501 once the loss is stuck, once, and no incident."""
    model = mlp()
    policy = gradwatch.AutoClip(gradwatch.ClipNorm(1e-3), when="always")
    with gradwatch.attach(model, clip=policy, report=None, strict=True) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 200)
    assert [note[:33] for note in monitor.notes] == ["auto-clip to a norm of 0.001 had c"[:33]]
    assert monitor.notes[0].endswith("(GW501).")
    assert monitor.incidents == []


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_reports_name_the_bound_that_was_set_and_none_before(clip: str) -> None:
    """The bound of the class is not the one that clips."""
    quiet, _ = exploding(clip, at=1000)
    assert quiet.snapshot().clipping == {"norm": "ClipNorm", "value": "ClipValue"}[clip]
    monitor, _ = exploding(clip)
    record = monitor.incidents[0].clip
    assert record is not None
    assert record.clipped
    assert monitor.snapshot().clipping == record.clip
    given, _ = exploding(gradwatch.ClipNorm(0.5), at=1000)
    assert given.snapshot().clipping == "ClipNorm(max_norm=0.5)"


def test_reports_name_the_bound_of_the_class_if_the_run_has_no_norms_yet() -> None:
    """In the first step there is nothing to choose a bound by."""
    monitor, _ = exploding("norm", at=0)
    assert monitor.snapshot().clipped
    assert monitor.snapshot().clipping == "ClipNorm(max_norm=1.0)"
