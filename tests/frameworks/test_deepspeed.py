"""Trainings under DeepSpeed: ZeRO's stages 0 to 3 on the CPU in two processes, held against DeepSpeed's own calls."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
pytest.importorskip("transformers", reason="needs the extra `frameworks`")
pytest.importorskip("accelerate", reason="needs the extra `frameworks`")
from tests.frameworks.deepspeed_runs import ALONE, EVENTS, FAILURE, LR, MODES, STEPS, Setup
from tests.torchrun import played

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed's own

Seen = dict[str, list[dict[str, Any]]]  # what each process saw, by training
LATE = "attached before DeepSpeed"
EXPLODING = [one for one in EVENTS if one.event == "explodes"]
BY_NAN = [one for one in EVENTS if one.event == "nan"]


def by_name(setup: Setup) -> str:
    """Return the name of a training."""
    return setup.name


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All trainings, made once in two processes."""
    each = played(tmp_path_factory, 2, "tests.frameworks.deepspeed_runs", patience=600)
    return {name: [of_rank[name] for of_rank in each] for name in each[0]}


def same(each: list[dict[str, Any]], *names: str) -> None:
    """Assert that both processes saw the same, to the last bit."""
    for name in names:
        assert len({json.dumps(one[name]) for one in each}) == 1, name


@pytest.mark.parametrize("setup", MODES, ids=by_name)
def test_rows_agree_with_whole_gradients(setup: Setup, seen: Seen) -> None:
    """Each layer's norm to five digits, without a gather; weights and losses too, and the same in both processes."""
    each = seen[setup.name]
    first, truth = each[0], each[0]["truth"]
    from_step = 1 if LATE in setup.name else 0  # what is attached first sees the first step pass by
    same(each, "norms", "global", "losses", "weights")
    assert first["layers"] == first["names"]
    assert first["processes"] == 2
    norms = np.array(truth["grads"][from_step:], dtype=float)
    assert len(first["norms"]) == STEPS - from_step
    np.testing.assert_allclose(first["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(first["global"], np.sqrt(np.nansum(norms**2, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(first["losses"], truth["losses"][from_step:], rtol=1e-5 if not setup.bf16 else 1e-2)
    np.testing.assert_allclose(first["weights"], truth["weights"][from_step:], rtol=1e-5)
    left = np.minimum(1.0, 0.1 / np.array(first["global"])) if setup.more == "clipping" else [1.0] * (STEPS - from_step)
    np.testing.assert_allclose(first["coefficients"], left, rtol=1e-5)
    assert not any(first["skipped"])
    assert first["family"] == ("adam" if setup.more == "AdamW" else "sgd")
    assert first["notes"] == []
    assert first["restored"]


def test_parameter_groups_keep_their_rates(seen: Seen) -> None:
    """The rate of the second group stands in the columns of its layers."""
    for stage in (2, 3):
        rates = seen[f"stage {stage}, two parameter groups"][0]["rate"]
        np.testing.assert_allclose(rates, [LR] * 3 + [LR / 2] * (len(rates) - 3))


def test_own_clips_are_measured_before(seen: Seen) -> None:
    """The norm in the row is that before `gradient_clipping`."""
    for stage in (0, 1, 3):
        one = seen[f"stage {stage}, gradient_clipping"][0]
        assert one["global"][-1] > 0.1
        assert one["clipped"] == "before the user's clip"
        assert one["truth"]["moves"][-1] == pytest.approx(LR * 0.1, rel=1e-3)


@pytest.mark.parametrize("stage", range(4))
def test_watching_changes_nothing_and_gathers_nothing(stage: int, seen: Seen) -> None:
    """Parameters are the same to the bit, and each step has one small sum more."""
    for one in seen[f"traffic, stage {stage}"]:
        assert one["same"]
        more = {name: one["watched"].get(name, 0) - one["alone"].get(name, 0) for name in one["watched"] | one["alone"]}
        assert {name: count for name, count in more.items() if count} == {"all_reduce": STEPS}


@pytest.mark.parametrize("setup", EXPLODING, ids=by_name)
def test_auto_clip_shortens_the_step_that_is_made(setup: Setup, seen: Seen) -> None:
    """By SGD a step is as long as rate times the norm that is left; all processes keep the same parameters."""
    each = seen[setup.name]
    same(each, "norms", "coefficients", "skipped", "incidents", "parameters")
    one = each[0]
    assert one["incidents"][0][0] == "exploding"
    left = np.array(one["coefficients"])
    assert left.min() < 0.5
    assert np.isfinite(np.array(one["parameters"][0])).all()
    expected = LR * np.array(one["global"]) * left * ~np.array(one["skipped"])
    masters = not setup.bf16 or setup.stage > 0 or setup.more == "float32"
    if masters and setup.clip == "norm":
        np.testing.assert_allclose(one["truth"]["moves"], expected, rtol=1e-2 if setup.bf16 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("setup", BY_NAN, ids=by_name)
def test_a_step_that_is_not_finite_is_left_out_as_after_an_overflow(setup: Setup, seen: Seen) -> None:
    """Weights stay, the engine counts it, the schedule waits, and the next step has its own gradients."""
    each = seen[setup.name]
    same(each, "norms", "losses", "incidents", "skipped", "parameters")
    one = each[0]
    assert one["skipped"] == [step == 3 for step in range(8)]
    assert one["truth"]["moves"][3] == 0
    assert min(one["truth"]["moves"][:3] + one["truth"]["moves"][4:]) > 0
    kind, opened, ranks, evidence, _ = one["incidents"][0]
    assert (kind, opened, ranks) == ("nonfinite", 3, [1])
    assert "on rank 1 alone the loss was not finite at step 3" in evidence
    rest = [step for step in range(8) if step != 3]
    np.testing.assert_allclose(np.array(one["norms"])[rest], np.array(one["truth"]["grads"])[rest], rtol=1e-5)
    assert all(math.isnan(norm) for norm in one["norms"][3])
    assert one["skipped steps"] == 1
    assert one["scheduled"] == 7
    assert one["restored"]


def test_a_failure_of_gradwatch_in_one_process_stops_nobody(seen: Seen) -> None:
    """Training goes on in both, and each says what happened."""
    first, second = seen[FAILURE.name]
    same([first, second], "parameters", "norms")
    assert len(first["norms"]) == 3
    assert first["skipped steps"] == 0
    assert min(first["truth"]["moves"]) > 0
    assert "failed in another process" in first["notes"][0]
    assert "TypeError" in second["notes"][0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trainings in one process."""
    found: dict[str, Any] = played(tmp_path_factory, 1, "tests.frameworks.deepspeed_runs", patience=300)[0]
    return found


@pytest.mark.parametrize("setup", ALONE, ids=by_name)
def test_one_process_alone_is_watched_too(setup: Setup, alone: dict[str, Any]) -> None:
    """Against the same calls of DeepSpeed."""
    one = alone[setup.name]
    np.testing.assert_allclose(one["norms"], one["truth"]["grads"], rtol=1e-5)
    np.testing.assert_allclose(one["weights"], one["truth"]["weights"], rtol=1e-5)
    np.testing.assert_allclose(one["losses"], one["truth"]["losses"], rtol=1e-5)
    assert one["processes"] == 1
    assert one["notes"] == []
    assert one["restored"]


def test_a_parameter_that_is_empty_while_it_is_not_in_use_is_read_where_it_is(alone: dict[str, Any]) -> None:
    """The guard of checkpoints sees the NaN in the part."""
    assert "parameter 0.weight holds 1 NaN" in alone["damaged"]


def test_what_cannot_be_done_is_refused_with_the_reason(seen: Seen) -> None:
    """A clip of whole layers, one of gradients on the host, and gradients that DeepSpeed itself cannot find."""
    for whole, offloaded, elsewhere in seen["refused"]:
        assert "needs whole layers, and each process holds parts of those" in whole
        assert "keeps gradients on the host or on disk" in offloaded
        assert "round_robin_gradients puts gradients elsewhere" in elsewhere


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_which_steps_inside_backward_gives_the_same_rows(stage: int, seen: Seen) -> None:
    """As the training with the engine's own calls."""
    for one, plain in zip(seen[f"accelerated, stage {stage}"], seen[f"stage {stage}, accumulation"], strict=True):
        np.testing.assert_allclose(one["norms"], plain["norms"], rtol=1e-5)
        np.testing.assert_allclose(one["losses"], plain["losses"], rtol=1e-5)
        assert one["notes"] == []


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_logs_the_same_norms_and_losses(stage: int, seen: Seen) -> None:
    """Its ``grad_norm`` is DeepSpeed's own; the callback logs beside it."""
    for one in seen[f"under the Trainer, stage {stage}"]:
        assert len(one["global"]) == STEPS
        np.testing.assert_allclose(one["global"], one["grad_norm"], rtol=1e-4)
        np.testing.assert_allclose(one["losses"], one["loss"], rtol=1e-3)
        np.testing.assert_allclose(one["gradwatch/global_norm"], one["global"])
