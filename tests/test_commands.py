"""The commands that read a run log, as a user types them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import AutoClip
from gradwatch.__main__ import main
from gradwatch.autoclip.limits import AutoClipLimits
from gradwatch.autoclip.suggest import suggest
from gradwatch.commands import COMMANDS
from gradwatch.runlog import RunLog
from tests.test_run_log import watched
from tests.trainings import data, mlp

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs: one that is well, one that explodes, one that is the first one again with another rate."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("well", 0.05), ("explodes", 1e6), ("faster", 0.4)):
        watched(folder / name, rate=rate, steps=120)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run a command; return what it printed, in one line of blanks."""
    assert main([str(one) for one in arguments]) == code
    return " ".join(capsys.readouterr().out.split())


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """Run a command with ``--json``; return what it says."""
    assert main([*(str(one) for one in arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_list_names_every_run_below_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With model, state, steps, last loss and the worst incident; a damaged one has its error."""
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.sqlite").write_bytes(b"no run log")
    found = {one["run"].rpartition("/")[2]: one for one in told(capsys, "list", runs)}
    assert found.keys() == {"well", "explodes", "faster", "damaged"}
    assert (found["well"]["steps"], found["well"]["state"], found["well"]["worst"]) == (120, "ended", None)
    assert (found["explodes"]["worst"], found["explodes"]["loss"]) == ("critical", None)
    assert "is not a run log" in found["damaged"]["error"]
    text = said(capsys, "list", runs)
    assert "Sequential" in text
    assert "critical" in text
    assert said(capsys, "list", runs / "well" / "nothing", code=2) == ""
    (runs / "damaged" / "run.sqlite").unlink()


def test_report_tells_the_story(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The monitor's own summary, and whether the run goes on."""
    text = said(capsys, "report", runs / "explodes")
    with RunLog(runs / "explodes") as log:
        incident = log.incidents[0]
    assert "120 steps of Sequential (6 layers" in text
    assert str(incident) in text
    assert all(f"do: {line}"[:60] in text for line in incident.advice)
    assert "explodes: ended" in text


def test_report_as_json_has_all_of_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strict JSON: what is not finite is null or text."""
    found = told(capsys, "report", runs / "explodes")
    assert (found["steps"], found["rows"], found["loss"]) == (120, 120, None)
    assert found["incidents"][0]["severity"] == "critical"
    assert found["sessions"][0]["environment"]["rules"]


def test_report_check_is_for_ci(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 after an incident of severity warning or worse, else 0; 2 where there is no log."""
    said(capsys, "report", runs / "well", "--check", code=0)
    said(capsys, "report", runs / "explodes", "--check", code=1)
    said(capsys, "report", runs / "none", "--check", code=2)


def test_replay_says_what_other_thresholds_would_have_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what was said; without changes both are the same."""
    same = told(capsys, "replay", runs / "explodes")
    assert same["replayed"] == same["recorded"]
    assert same["rows"] == 120
    other = told(capsys, "replay", runs / "explodes", "--rule", "GW302.for_steps=500", "--rule", "GW103.for_steps=500")
    assert other["recorded"] == same["recorded"]
    assert same["recorded"]["alarms"]["GW302"] > 0
    assert not {"GW302", "GW103"} & other["replayed"]["alarms"].keys()
    text = said(capsys, "replay", runs / "explodes", "--rule", "GW302.for_steps=500")
    assert "GW302 6 0" in text
    assert "incidents, replayed:" in text
    said(capsys, "replay", runs / "explodes", "--rule", "GW302.limits=5", code=2)


def test_replay_says_that_explosions_close_without_the_hold_of_auto_clip(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the numbers that were in force on either side; nothing of it where there was no auto-clip."""

    def spoil(step: int) -> None:
        if step == 30:
            x[0, 0] = math.nan
        elif step == 31:
            x[0, 0] = 0.0

    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(
        model, report=None, log=tmp_path / "held", clip=gradwatch.AutoClip("norm", hold=35), strict=True
    ):
        for step in range(90):
            spoil(step)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    found = told(capsys, "replay", tmp_path / "held", "--rule", "verdict.calm_steps=15")
    (before,), (after,) = found["recorded"]["incidents"], found["replayed"]["incidents"]
    assert before["closed_step"] - after["closed_step"] == 35 - 15
    words = "auto-clip is not replayed: an explosion closes after 15 calm steps here (verdict.calm_steps), after 35 or more in"
    assert found["auto-clip"].startswith(words)
    assert words in said(capsys, "replay", tmp_path / "held", "--rule", "verdict.calm_steps=15")
    assert told(capsys, "replay", runs / "explodes")["auto-clip"] is None
    assert "auto-clip" not in said(capsys, "replay", runs / "explodes")


def test_compare_says_where_two_runs_part(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first loss that differs is the one after the first update; a run does not part from itself."""
    found = told(capsys, "compare", runs / "well", runs / "explodes")
    assert found["first_difference"] == 1
    with RunLog(runs / "well") as a, RunLog(runs / "explodes") as b:
        left, right = a.norms()[1], b.norms()[1]
        for one in found["layers"]:
            column, step = a.layers.index(one["layer"]), one["step"]
            pair = sorted([left[step, column], right[step, column]])
            assert not np.isfinite(right[step, column]) or pair[1] > 4 * pair[0]
            before = range(max(0, step - 10), step)
            assert not all(right[n, column] > 4 * left[n, column] for n in before) or not before
    assert [one["step"] for one in found["layers"]] == sorted(one["step"] for one in found["layers"])
    assert len(found["layers"]) == 6
    same = told(capsys, "compare", runs / "well", runs / "well")
    assert (same["first_difference"], same["losses"], same["layers"]) == (None, None, [])
    assert "losses: equal at every common step" in said(capsys, "compare", runs / "well", runs / "well")
    assert "gradient norms diverge" in said(capsys, "compare", runs / "well", runs / "explodes")


def test_compare_says_first_in_which_settings_two_runs_differ(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate and since when, the optimizer and its options, the batch, the model, auto-clip, thresholds, versions."""
    found = told(capsys, "compare", runs / "well", runs / "faster")
    assert found["settings"] == [{"name": "learning rate", "left": "0.05", "right": "0.4", "from_step": 0}]
    assert told(capsys, "compare", runs / "well", runs / "well")["settings"] == []

    model = mlp(width=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x, y = data(n=48)
    rules = [gradwatch.rules.LossJump(limit=33.0), *(r for r in gradwatch.default_rules() if r.code != "GW102")]
    with gradwatch.attach(model, report=None, log=tmp_path / "other", clip="norm", rules=rules, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
    with closing(sqlite3.connect(tmp_path / "other" / "run.sqlite")) as db, db:
        db.execute("UPDATE sessions SET environment = replace(environment, ?, ?)", (torch.__version__, "1.2.3"))
    found = told(capsys, "compare", runs / "well", tmp_path / "other")
    differ = {one["name"]: (one["left"], one["right"]) for one in found["settings"]}
    assert differ["learning rate"] == ("0.05", "from 0.1 to 0.025")
    assert differ["optimizer"] == ("SGD", "AdamW")
    assert differ["weight_decay of the optimizer"] == ("0", "0.3")
    assert differ["batch (shape of the first prediction)"] == ("32 x 1", "48 x 1")
    assert differ["parameters"] == ("433", "841")
    assert differ["auto-clip"][0] == "off"
    assert "ClipNorm" in differ["auto-clip"][1]
    assert differ["rule GW102 limit"][1] == "33.0"
    assert differ["version of torch"] == (torch.__version__, "1.2.3")
    assert not {"model", "loss", "version of numpy"} & differ.keys()
    text = said(capsys, "compare", runs / "well", tmp_path / "other")
    assert "learning rate, from step 0 on 0.05 from 0.1 to 0.025" in text
    assert "otherwise the same: loss scale, " in text
    assert text.index("settings that differ") < text.index("losses: first difference")


@pytest.mark.parametrize(
    ("left", "right", "differ"),
    [
        (AutoClip("norm"), AutoClip("norm", hold=50), {"auto-clip hold": ("30", "50")}),
        (
            AutoClip(gradwatch.ClipNorm(1.0), limits=AutoClipLimits(wide=3.0)),
            AutoClip(gradwatch.ClipNorm(2.0), escalate=("rate",)),
            {
                "auto-clip clip.max_norm": ("1.0", "2.0"),
                "auto-clip escalate": ("()", "('rate',)"),
                "auto-clip limits.wide": ("3.0", "2.0"),
            },
        ),
        (
            AutoClip(gradwatch.ClipValue(1.0), when="always"),
            AutoClip(gradwatch.ClipValue(1.0, layers={"0.*": 2.0}), when="always"),
            {"auto-clip clip.layers": ("none", "{'0.*': 2.0}")},
        ),
        (
            AutoClip(gradwatch.ClipValue(1.0), when="always"),
            AutoClip(gradwatch.ClipNorm(1.0), when="always"),
            {"auto-clip clip": ("ClipValue(max_value=1.0)", "ClipNorm(max_norm=1.0)")},
        ),
    ],
    ids=["one", "nested", "of the clip", "another clip"],
)
def test_compare_names_the_settings_in_which_two_policies_of_auto_clip_differ(
    left: AutoClip,
    right: AutoClip,
    differ: dict[str, tuple[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And no others, which are the same twenty in every run; equal policies are one setting."""
    for name, clip in (("left", left), ("right", right)):
        watched(tmp_path / name, steps=3, clip=clip)
    found = told(capsys, "compare", tmp_path / "left", tmp_path / "right")["settings"]
    assert {one["name"]: (one["left"], one["right"]) for one in found} == differ
    assert ", auto-clip," in said(capsys, "compare", tmp_path / "left", tmp_path / "left")


def test_compare_says_what_is_not_known(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a log from before rates and batches were kept."""
    shutil.copytree(runs / "well", tmp_path / "old")
    with closing(sqlite3.connect(tmp_path / "old" / "run.sqlite")) as db, db:
        db.execute("DROP TABLE step_settings")
        facts = json.loads(db.execute("SELECT facts FROM sessions").fetchone()[0])
        del facts["prediction"], facts["optimizer_options"]
        db.execute("UPDATE sessions SET facts = ?", (json.dumps(facts),))
    found = told(capsys, "compare", runs / "well", tmp_path / "old")
    differ = {one["name"]: (one["left"], one["right"]) for one in found["settings"]}
    assert differ["learning rate"] == ("0.05", "not known")
    assert differ["batch (shape of the first prediction)"] == ("32 x 1", "not known")
    assert (found["first_difference"], found["losses"], found["layers"]) == (None, None, [])
    text = said(capsys, "compare", tmp_path / "old", tmp_path / "old")
    assert "not known of either: learning rate, batch" in text


def test_suggest_finds_a_threshold_in_the_runs_own_norms(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that `gradwatch.autoclip.suggest` finds in the same norms."""
    with RunLog(runs / "well") as log:
        found = suggest(log.series().global_norm)
    assert told(capsys, "suggest", runs / "well")["threshold"] == found.threshold
    assert f"ClipNorm({found.threshold:.3g})" in said(capsys, "suggest", runs / "well")


def test_export_to_csv_can_be_read_back(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each number as it is in the log."""
    said(capsys, "export", runs / "well", "--to", "csv", "--out", tmp_path)
    with RunLog(runs / "well") as log, (tmp_path / "gradient_norms.csv").open() as file:
        names, *rows = csv.reader(file)
        assert names == ["step", *log.layers]
        assert np.array_equal(np.array(rows, dtype=float)[:, 1:].astype(np.float32), log.norms()[1])
        with (tmp_path / "steps.csv").open() as steps:
            assert [float(row["loss"]) for row in csv.DictReader(steps)] == log.series().loss.tolist()


def test_export_to_parquet_can_be_read_back(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By pyarrow; incidents with their whole story."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra: pip install 'gradwatch[export]'")
    said(capsys, "export", runs / "explodes", "--to", "parquet", "--out", tmp_path)
    with RunLog(runs / "explodes") as log:
        norms = parquet.read_table(tmp_path / "gradient_norms.parquet")
        assert norms.column_names == ["step", *log.layers]
        first = norms.column(1).to_numpy()
        assert np.array_equal(first, log.norms()[1][:, 0], equal_nan=True)
        incidents = parquet.read_table(tmp_path / "incidents.parquet").to_pylist()
        assert [one["kind"] for one in incidents] == [one.kind for one in log.incidents]


def test_export_to_tensorboard_can_be_read_back(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By TensorBoard's own reader."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is an extra: pip install 'gradwatch[tensorboard]'",
    )
    said(capsys, "export", runs / "explodes", "--to", "tensorboard", "--out", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    with RunLog(runs / "explodes") as log:
        series = log.series()
        norms = events.Scalars("gradwatch/global_norm")
        assert [one.step for one in norms] == series.step.tolist()
        assert np.allclose([one.value for one in norms], series.global_norm, rtol=1e-6, equal_nan=True)
        assert len(events.Scalars(f"gradwatch/gradient_norm/{log.layers[0]}")) == len(series.step)
        assert "gradwatch/incidents/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_each_command_shows_examples(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """That begin with its name."""
    with pytest.raises(SystemExit) as ended:
        main([command.NAME, "--help"])
    assert ended.value.code == 0
    assert f"gradwatch {command.NAME}" in command.EXAMPLES
    assert "examples:" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_fault(runs: Path) -> None:
    """`gradwatch report RUN | head -1` ends without a traceback."""
    line = f"{sys.executable} -m gradwatch report {runs / 'explodes'} --json | head -1"
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{\n"
    assert done.stderr == ""
