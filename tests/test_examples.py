"""The examples, run: what they show is asserted."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import gradwatch
from examples import digits_classifier, regression_mlp, rnn_long_sequence, survival_nan

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_regression_explodes_unwatched_and_is_seen_in_time(seed: int) -> None:
    """Lost within about 8 steps; the incident opens at least 2 steps before, confirmed by subtle and confirming signs."""
    plain = regression_mlp.unwatched(seed, epochs=2)
    watched, monitor = regression_mlp.watched(seed, None, epochs=2)
    lost = plain.nonfinite_step
    assert lost is not None
    assert lost <= 10
    assert watched.losses[:lost] == plain.losses[:lost]
    assert len([incident for incident in monitor.incidents if incident.severity != "notice"]) == 1
    incident = monitor.incidents[0]
    assert incident.opened_step <= lost - 2
    assert incident.confirmed_step is not None
    assert incident.confirmed_step < lost
    assert {"subtle", "confirming", "growth"} <= {sign.sign for sign in incident.signs}


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("seed", SEEDS)
def test_auto_clip_saves_the_regression(seed: int, clip: str) -> None:
    """Finite to the end, and better than predicting the mean (a test error of some 13,000) by far."""
    result, monitor = regression_mlp.watched(seed, clip, epochs=100 if clip == "norm" else 40)
    assert result.nonfinite_step is None
    assert result.test_error < 1000
    assert monitor.incidents[0].clip is not None
    assert monitor.incidents[0].clip.clipped > 0


def test_the_vanilla_rnn_explodes_and_clipping_by_norm_saves_it() -> None:
    """Watched only it ends in NaN; with auto-clip to norm 5 and 10 it learns."""
    lost = rnn_long_sequence.train()
    assert not lost.finite
    assert lost.monitor.incidents[0].kind == "exploding"
    assert "recurrent" in (lost.monitor.incidents[0].suspect or "")
    assert "LSTM or GRU" in " ".join(lost.monitor.incidents[0].advice)
    for bound in (5.0, 10.0):
        saved = rnn_long_sequence.train(clip=gradwatch.AutoClip(gradwatch.ClipNorm(bound)))
        assert saved.finite
        assert sum(saved.losses[-20:]) / 20 < 1


@pytest.mark.parametrize("clip", [None, 5.0, 10.0])
def test_the_lstm_is_healthy_and_left_alone(clip: float | None) -> None:
    """No incident, no clip."""
    policy = gradwatch.AutoClip(gradwatch.ClipNorm(clip)) if clip else None
    result = rnn_long_sequence.train("lstm", policy, steps=80)
    assert result.finite
    assert result.monitor.incidents == []
    assert set(result.monitor.history.clip_coefficient()) == {1.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_healthy_classifier_has_no_incident_at_all(seed: int) -> None:
    """Not even a notice."""
    accuracy, monitor = digits_classifier.train(digits_classifier.HEALTHY_RATE, seed=seed)
    assert monitor.incidents == []
    assert accuracy > 0.85


def test_a_rate_that_wrecks_the_classifier_is_seen_and_a_clip_saves_it() -> None:
    """Auto-clip finds a bound that is tight enough by itself."""
    rate = digits_classifier.WRECKING_RATE
    wrecked, monitor = digits_classifier.train(rate)
    assert wrecked < 0.3
    assert monitor.incidents[0].kind == "exploding"
    found, monitor = digits_classifier.train(rate, "norm")
    assert found > 0.5
    assert "ClipNorm(max_norm=0.25)" in str(monitor.incidents[0].clip)
    saved, _ = digits_classifier.train(rate, gradwatch.AutoClip(gradwatch.ClipNorm(0.05)))
    assert saved > 0.7


@pytest.mark.parametrize("name", ["digits_classifier", "rnn_long_sequence"])
def test_an_example_runs_as_a_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user would start it."""
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / f"{name}.py"), run_name="__main__")
    assert "exploding" in capsys.readouterr().out


def test_the_survival_model_says_which_line_makes_nan_although_the_loss_is_finite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The operation, the line, the direction and what to do are in the lines that the README shows."""
    survival_nan.main()
    said = capsys.readouterr().err
    code = Path(survival_nan.__file__).read_text().splitlines()
    (line,) = [number for number, text in enumerate(code, 1) if "torch.log(" in text]
    assert f"`log` at survival_nan.py:{line} in the model (backward)" in said
    assert "a dropped branch" in said
    assert "clamp the argument before the log" in said
    assert "2 skipped" in said
