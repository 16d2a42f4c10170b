"""Distributed trainings: the same right numbers, verdicts and decisions in every process."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest

from tests.processes import BOTH, DDP, FSDP2, MODES, PAIRS, STEPS, Mode, Play, alone
from tests.torchrun import forked, played

Seen = dict[Play, list[dict[str, Any]]]  # what each process saw


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All trainings, made once in two processes and in four."""
    found: Seen = {}
    for processes in (2, 4):
        by_rank = played(tmp_path_factory, processes, "tests.processes")
        for trainings in zip(*by_rank, strict=True):
            found[Play(*trainings[0][0])] = [of_rank for _, of_rank in trainings]
    return found


@functools.cache
def reference() -> dict[str, Any]:
    """Train in this process alone."""
    return alone()


def same(each: list[dict[str, Any]], *names: str) -> None:
    """Assert that all processes saw the same, to the last bit."""
    for name in names:
        texts = {json.dumps(one[name]) for one in each}
        assert len(texts) == 1, (name, texts)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_rows_agree_with_a_training_in_one_process(mode: Mode, seen: Seen) -> None:
    """Layer norms, global norm and loss within 1e-6 of a float64 loop, in each process; one exchange for one step."""
    each = seen[Play(mode.name)]
    truth = reference()
    same(each, "norms", "global", "losses", "weights", "incidents", "coefficients")
    first = each[0]
    assert first["notes"] == []
    assert first["processes"] == mode.processes
    assert first["exchanges"] == STEPS
    totals = [math.sqrt(sum(norm**2 for norm in step.values())) for step in truth["norms"]]
    np.testing.assert_allclose(first["global"], totals, rtol=1e-6)
    np.testing.assert_allclose(first["losses"], truth["losses"], rtol=1e-6)
    if mode.names:
        assert first["layers"] == list(truth["norms"][0])
        np.testing.assert_allclose(first["norms"], [list(step.values()) for step in truth["norms"]], rtol=1e-6)
    told = [any(line.startswith("gradwatch ") for line in one["output"].splitlines()) for one in each]
    assert told == [True] + [False] * (mode.processes - 1)  # one of them draws


@pytest.mark.parametrize("name", PAIRS[:2])
@pytest.mark.parametrize(
    ("event", "word"),
    [("nan loss", "the loss was not finite"), ("nan gradient", "there are gradients that are not finite")],
)
def test_nan_in_one_process_is_seen_by_all_and_that_rank_is_named(name: str, event: str, word: str, seen: Seen) -> None:
    """The step is skipped everywhere, and parameters stay the same everywhere.

    A part of a gradient that FSDP2 has reduced is of all processes, so that none is named for what it holds.
    """
    each = seen[Play(name, event, "norm")]
    same(each, "norms", "losses", "incidents", "skipped", "parameters")
    kind, _, opened, _, who, evidence, _ = each[0]["incidents"][0]
    unknown = (name, event) == (FSDP2, "nan gradient")
    assert (kind, opened, who) == ("nonfinite", 3, [] if unknown else [1])
    assert (f"on rank 1 alone {word} at step 3" in evidence) is not unknown
    assert each[0]["skipped"][:5] == [False, False, False, True, False]
    assert np.isfinite(np.concatenate(each[0]["parameters"])).all()


def test_nan_that_one_backward_made_is_traced_through_the_average(seen: Seen) -> None:
    """Under DDP all gradients are NaN after the average; the rank whose own backward gave it is named."""
    each = seen[Play(DDP, "nan backward", "norm")]
    same(each, "norms", "incidents", "skipped", "parameters")
    assert each[0]["incidents"][0][4] == [1]
    assert "on rank 1 alone backward gave gradients that are not finite at step 3" in each[0]["incidents"][0][5]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_auto_clip_keeps_all_processes_in_step(name: str, clip: str, seen: Seen) -> None:
    """An explosion is clipped at the same steps by the same factors; parameters end identical and finite."""
    each = seen[Play(name, "explodes", clip)]
    same(each, "norms", "losses", "incidents", "coefficients", "skipped", "parameters")
    assert each[0]["incidents"][0][0] == "exploding"
    assert min(each[0]["coefficients"]) < 1
    assert np.isfinite(np.concatenate(each[0]["parameters"])).all()
    assert each[0]["exchanges"] == 30


@pytest.mark.parametrize("name", [DDP, FSDP2, BOTH])
def test_rows_that_come_later_agree_in_all_processes(name: str, seen: Seen) -> None:
    """The path for devices: the same numbers, one exchange for one step."""
    each = seen[Play(name, later=True)]
    same(each, "norms", "global", "losses", "weights", "incidents", "coefficients")
    truth = reference()
    np.testing.assert_allclose(each[0]["norms"], [list(step.values()) for step in truth["norms"]], rtol=1e-6)
    np.testing.assert_allclose(each[0]["losses"], truth["losses"], rtol=1e-6)
    assert each[0]["exchanges"] == STEPS


@pytest.mark.parametrize(("event", "clip"), [("nan loss", "norm"), ("explodes", "norm"), ("explodes", "value")])
def test_decisions_that_fall_on_devices_are_the_same(event: str, clip: str, seen: Seen) -> None:
    """Without a read, and with rows that the host sees eight steps later, parameters stay identical and finite."""
    each = seen[Play(FSDP2, event, clip, later=True)]
    same(each, "norms", "losses", "incidents", "coefficients", "skipped", "parameters")
    assert np.isfinite(np.concatenate(each[0]["parameters"])).all()
    assert each[0]["incidents"]
    if event == "nan loss":
        assert each[0]["incidents"][0][2] == 3
        assert each[0]["incidents"][0][4] == [1]
    else:
        assert np.nanmin(each[0]["coefficients"]) < 1


def test_a_failure_that_is_seen_later_switches_all_off_at_the_same_step(seen: Seen) -> None:
    """Nobody is left waiting although the news takes eight steps."""
    first, second = seen[Play(DDP, "gradwatch fails", "norm", later=True)]
    same([first, second], "parameters", "exchanges")
    assert "failed in another process" in first["notes"][-1]


def test_a_failure_of_gradwatch_in_one_process_switches_all_off(seen: Seen) -> None:
    """Training goes on, nobody waits for rows, and each process says what happened."""
    first, second = seen[Play(DDP, "gradwatch fails", "norm")]
    same([first, second], "parameters", "norms", "exchanges")
    assert "TypeError" in second["notes"][0]
    assert "failed in another process" in first["notes"][0]
    assert first["exchanges"] == 4


def test_one_process_that_attaches_alone_watches_alone(seen: Seen) -> None:
    """It says so, does not clip, and nobody hangs."""
    first, second = seen[Play(DDP, "one attaches", "norm")]
    assert "call attach() in each of them" in first["notes"][0]
    assert first["processes"] == 1
    assert len(first["losses"]) == 30
    assert "norms" not in second


def test_the_others_end_with_an_error_when_one_process_is_killed() -> None:
    """Not with a hang. Started without torchrun, which would end the others itself."""
    ended = forked(4, "tests.processes", "killed")
    assert [code for code, _ in ended] == [1, 1, 1, -9]
    assert all("gradwatch could not exchange a row with the other 3 processes" in said for _, said in ended[:3])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All scenes, played once by torchrun in two processes."""
    return played(tmp_path_factory, 2, "tests.scenes", torchrun=True)


def test_one_optimizer_over_several_models_exchanges_in_one_order(scenes: list[dict[str, Any]]) -> None:
    """Each model's rows are its own."""
    for one in scenes:
        scene = one["one_optimizer_over_several_models"]
        np.testing.assert_allclose(scene["norms"], scene["truth"], rtol=1e-6)


@pytest.mark.parametrize("name", ["uneven_batches", "uneven_batches_on_a_device"])
def test_nobody_waits_for_a_process_without_batches(name: str, scenes: list[dict[str, Any]]) -> None:
    """And each process says that it goes on by itself."""
    assert [one[name]["rows"] for one in scenes] == [6, 8]
    assert [one[name]["processes"] for one in scenes] == [1, 1]
    assert all("auto-clip does not act" in one[name]["notes"][0] for one in scenes)


def test_a_failure_before_measuring_is_told_in_the_same_step(scenes: list[dict[str, Any]]) -> None:
    """Four rows in both, and the reason."""
    first, second = (one["failing_before_measuring"] for one in scenes)
    assert first["rows"] == second["rows"] == 4
    assert "OSError" in first["notes"][0]
    assert "failed in another process" in second["notes"][0]


def test_a_second_failure_while_the_first_is_on_its_way_hangs_nobody(scenes: list[dict[str, Any]]) -> None:
    """Both tell of their own."""
    assert all("OSError" in one["two_failures_on_devices"]["notes"][0] for one in scenes)


def test_a_process_without_gradients_decides_with_the_others(scenes: list[dict[str, Any]]) -> None:
    """From the numbers of all."""
    assert [one["no_gradient_in_one_process"]["skipped"] for one in scenes] == [
        [False, False, True, True, False, False]
    ] * 2


def test_summands_are_clipped_by_the_same_factor(scenes: list[dict[str, Any]]) -> None:
    """The whole gradient has the norm that was asked for."""
    for one in scenes:
        assert one["summands_are_clipped_too"]["left"] == pytest.approx(1e-3, rel=1e-3)
        assert one["summands_are_clipped_too"]["notes"] == []


def test_clips_act_by_whole_layers_of_which_each_process_holds_parts(scenes: list[dict[str, Any]]) -> None:
    """All alike, on the host as by the path for devices; what cannot be known of a part is refused."""
    first, second = (one["clips_on_parts_of_layers"] for one in scenes)
    assert first == second
    for name in ("layer norm", "layer norm, later"):
        assert max(first[name]["norms"]) == pytest.approx(1.0, rel=1e-4)
        assert first[name]["coefficients"][-1] < 0.1
    for name in ("norm then value", "percentile", "adagc"):
        # on a device the newest row is not known yet, so that a percentile of the rows before is another one
        if name != "percentile":
            np.testing.assert_allclose(first[name]["norms"], first[f"{name}, later"]["norms"], rtol=1e-4)
        assert min(first[name]["coefficients"]) < 1
    assert first["after an own clip"]["coefficients"] == pytest.approx([1.0] * 6)
    assert "does not act after a clip of your own" in first["after an own clip"]["notes"][0]
    assert "needs whole layers" in first["agc"]


def test_a_dropped_model_is_freed(scenes: list[dict[str, Any]]) -> None:
    """In each process."""
    assert all(one["a_dropped_model"]["freed"] for one in scenes)
