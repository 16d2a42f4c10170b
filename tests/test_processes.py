"""Distributed trainings under torchrun: the same right numbers, verdicts and decisions in every process."""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import MODES, STEPS, Mode, alone

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BY_NAME = {mode.name: mode for mode in MODES}
PAIRS = ["DistributedDataParallel", "FSDP2 (`fully_shard`)", "tensor parallel, plain parameters beside DTensors"]


def torchrun(processes: int, folder: Path, *arguments: str, **more: str) -> dict[Path, str]:
    """Run a module of the tests in several processes; return what they wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--redirects", "3", "--log-dir", str(folder / "log"), "-m", *arguments]
    environment = {**ENVIRONMENT, **more}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    logs = {path: path.read_text() for path in (folder / "log").rglob("std*.log")}
    assert done.returncode == 0, "\n".join(logs.values()) + done.stderr
    return logs


def launch(
    mode: Mode, folder: Path, event: str = "nothing", clip: str = "none", *, later: bool = False
) -> list[dict[str, Any]]:
    """Train under torchrun, ``later`` by the path for devices; return what each process saw."""
    more = {"AS_ON_A_DEVICE": "1"} if later else {}
    logs = torchrun(mode.processes, folder, "tests.processes", mode.name, event, clip, str(folder), **more)
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(mode.processes)]
    for rank, one in enumerate(seen):
        one["output"] = "".join(text for path, text in logs.items() if path.parent.name == str(rank))
    return seen


@functools.cache
def reference() -> dict[str, Any]:
    """Train in this process alone."""
    return alone()


def same(seen: list[dict[str, Any]], *names: str) -> None:
    """Assert that all processes saw the same, to the last bit."""
    for name in names:
        texts = {json.dumps(one[name]) for one in seen}
        assert len(texts) == 1, (name, texts)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_rows_agree_with_a_training_in_one_process(mode: Mode, tmp_path: Path) -> None:
    """Layer norms, global norm and loss within 1e-6 of a float64 loop, in each process; one exchange for one step."""
    seen = launch(mode, tmp_path)
    truth = reference()
    same(seen, "norms", "global", "losses", "weights", "incidents", "coefficients")
    first = seen[0]
    assert first["notes"] == []
    assert first["processes"] == mode.processes
    assert first["exchanges"] == STEPS
    totals = [math.sqrt(sum(norm**2 for norm in step.values())) for step in truth["norms"]]
    np.testing.assert_allclose(first["global"], totals, rtol=1e-6)
    np.testing.assert_allclose(first["losses"], truth["losses"], rtol=1e-6)
    if mode.names:
        assert first["layers"] == list(truth["norms"][0])
        np.testing.assert_allclose(first["norms"], [list(step.values()) for step in truth["norms"]], rtol=1e-6)
    told = [any(line.startswith("gradwatch ") for line in one["output"].splitlines()) for one in seen]
    assert told == [True] + [False] * (mode.processes - 1)  # one of them draws


@pytest.mark.parametrize("name", PAIRS[:2])
@pytest.mark.parametrize(
    ("event", "word"),
    [("nan loss", "the loss was not finite"), ("nan gradient", "there are gradients that are not finite")],
)
def test_nan_in_one_process_is_seen_by_all_and_that_rank_is_named(
    name: str, event: str, word: str, tmp_path: Path
) -> None:
    """The step is skipped everywhere, and parameters stay the same everywhere."""
    seen = launch(BY_NAME[name], tmp_path, event, "norm")
    same(seen, "norms", "losses", "incidents", "skipped", "parameters")
    kind, _, opened, _, who, evidence, _ = seen[0]["incidents"][0]
    assert (kind, opened, who) == ("nonfinite", 3, [1])
    assert f"on rank 1 alone {word} at step 3" in evidence
    assert seen[0]["skipped"][:5] == [False, False, False, True, False]
    assert np.isfinite(np.concatenate(seen[0]["parameters"])).all()


def test_nan_that_one_backward_made_is_traced_through_the_average(tmp_path: Path) -> None:
    """Under DDP all gradients are NaN after the average; the rank whose own backward gave it is named."""
    seen = launch(BY_NAME["DistributedDataParallel"], tmp_path, "nan backward", "norm")
    same(seen, "norms", "incidents", "skipped", "parameters")
    assert seen[0]["incidents"][0][4] == [1]
    assert "on rank 1 alone backward gave gradients that are not finite at step 3" in seen[0]["incidents"][0][5]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_auto_clip_keeps_all_processes_in_step(name: str, clip: str, tmp_path: Path) -> None:
    """An explosion is clipped at the same steps by the same factors; parameters end identical and finite."""
    seen = launch(BY_NAME[name], tmp_path, "explodes", clip)
    same(seen, "norms", "losses", "incidents", "coefficients", "skipped", "parameters")
    assert seen[0]["incidents"][0][0] == "exploding"
    assert min(seen[0]["coefficients"]) < 1
    assert np.isfinite(np.concatenate(seen[0]["parameters"])).all()
    assert seen[0]["exchanges"] == 30


LATER = ["DistributedDataParallel", "FSDP2 (`fully_shard`)", "FSDP2 x tensor parallel, 2 x 2"]


@pytest.mark.parametrize("name", LATER)
def test_rows_that_come_later_agree_in_all_processes(name: str, tmp_path: Path) -> None:
    """The path for devices: the same numbers, one exchange for one step."""
    seen = launch(BY_NAME[name], tmp_path, later=True)
    same(seen, "norms", "global", "losses", "weights", "incidents", "coefficients")
    truth = reference()
    np.testing.assert_allclose(seen[0]["norms"], [list(step.values()) for step in truth["norms"]], rtol=1e-6)
    np.testing.assert_allclose(seen[0]["losses"], truth["losses"], rtol=1e-6)
    assert seen[0]["exchanges"] == STEPS


@pytest.mark.parametrize(("event", "clip"), [("nan loss", "norm"), ("explodes", "norm"), ("explodes", "value")])
def test_decisions_that_fall_on_devices_are_the_same(event: str, clip: str, tmp_path: Path) -> None:
    """Without a read, and with rows that the host sees eight steps later, parameters stay identical and finite."""
    seen = launch(BY_NAME["FSDP2 (`fully_shard`)"], tmp_path, event, clip, later=True)
    same(seen, "norms", "losses", "incidents", "coefficients", "skipped", "parameters")
    assert np.isfinite(np.concatenate(seen[0]["parameters"])).all()
    assert seen[0]["incidents"]
    if event == "nan loss":
        assert seen[0]["incidents"][0][2] == 3
        assert seen[0]["incidents"][0][4] == [1]
    else:
        assert np.nanmin(seen[0]["coefficients"]) < 1


def test_a_failure_that_is_seen_later_switches_all_off_at_the_same_step(tmp_path: Path) -> None:
    """Nobody is left waiting although the news takes eight steps."""
    first, second = launch(BY_NAME["DistributedDataParallel"], tmp_path, "gradwatch fails", "norm", later=True)
    same([first, second], "parameters", "exchanges")
    assert "failed in another process" in first["notes"][-1]


def test_a_failure_of_gradwatch_in_one_process_switches_all_off(tmp_path: Path) -> None:
    """Training goes on, nobody waits for rows, and each process says what happened."""
    first, second = launch(BY_NAME["DistributedDataParallel"], tmp_path, "gradwatch fails", "norm")
    same([first, second], "parameters", "norms", "exchanges")
    assert "TypeError" in second["notes"][0]
    assert "failed in another process" in first["notes"][0]
    assert first["exchanges"] == 4


def test_one_process_that_attaches_alone_watches_alone(tmp_path: Path) -> None:
    """It says so, does not clip, and nobody hangs."""
    mode = BY_NAME["DistributedDataParallel"]
    first, second = launch(mode, tmp_path, "one attaches", "norm")
    assert "call attach() in each of them" in first["notes"][0]
    assert first["processes"] == 1
    assert len(first["losses"]) == 30
    assert "norms" not in second


def test_the_others_end_with_an_error_when_one_process_is_killed(tmp_path: Path) -> None:
    """Not with a hang. Started without torchrun, which would end the others itself."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.processes", "DistributedDataParallel, 4 processes", "killed", "norm"]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(4)
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert running[3].returncode == -9
    assert all(process.returncode == 1 for process in running[:3])
    assert all("gradwatch could not exchange a row with the other 3 processes" in error for error in errors[:3])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All scenes, played once in two processes."""
    folder = tmp_path_factory.mktemp("scenes")
    torchrun(2, folder, "tests.scenes", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_one_optimizer_over_several_models_exchanges_in_one_order(played: list[dict[str, Any]]) -> None:
    """Each model's rows are its own."""
    for one in played:
        scene = one["one_optimizer_over_several_models"]
        np.testing.assert_allclose(scene["norms"], scene["truth"], rtol=1e-6)


@pytest.mark.parametrize("name", ["uneven_batches", "uneven_batches_on_a_device"])
def test_nobody_waits_for_a_process_without_batches(name: str, played: list[dict[str, Any]]) -> None:
    """And each process says that it goes on by itself."""
    assert [one[name]["rows"] for one in played] == [6, 8]
    assert [one[name]["processes"] for one in played] == [1, 1]
    assert all("auto-clip does not act" in one[name]["notes"][0] for one in played)


def test_a_failure_before_measuring_is_told_in_the_same_step(played: list[dict[str, Any]]) -> None:
    """Four rows in both, and the reason."""
    first, second = (one["failing_before_measuring"] for one in played)
    assert first["rows"] == second["rows"] == 4
    assert "OSError" in first["notes"][0]
    assert "failed in another process" in second["notes"][0]


def test_a_second_failure_while_the_first_is_on_its_way_hangs_nobody(played: list[dict[str, Any]]) -> None:
    """Both tell of their own."""
    assert all("OSError" in one["two_failures_on_devices"]["notes"][0] for one in played)


def test_a_process_without_gradients_decides_with_the_others(played: list[dict[str, Any]]) -> None:
    """From the numbers of all."""
    assert [one["no_gradient_in_one_process"]["skipped"] for one in played] == [
        [False, False, True, True, False, False]
    ] * 2


def test_summands_are_clipped_by_the_same_factor(played: list[dict[str, Any]]) -> None:
    """The whole gradient has the norm that was asked for."""
    for one in played:
        assert one["summands_are_clipped_too"]["left"] == pytest.approx(1e-3, rel=1e-3)
        assert one["summands_are_clipped_too"]["notes"] == []


def test_clips_act_by_whole_layers_of_which_each_process_holds_parts(played: list[dict[str, Any]]) -> None:
    """All alike, on the host as by the path for devices; what cannot be known of a part is refused."""
    first, second = (one["clips_on_parts_of_layers"] for one in played)
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


def test_a_dropped_model_is_freed(played: list[dict[str, Any]]) -> None:
    """In each process."""
    assert all(one["a_dropped_model"]["freed"] for one in played)
