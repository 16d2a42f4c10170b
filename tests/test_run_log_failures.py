"""What can go wrong with a run log: killed processes, full disks, files that are foreign or damaged, two writers."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.errors import RunLogError
from gradwatch.records import Facts, Scalars
from gradwatch.reports.log import LogReport
from gradwatch.runlog import RunLog
from gradwatch.runlog.batch import Batch
from gradwatch.runlog.store import Store
from gradwatch.runlog.writer import Writer
from tests.test_run_log import watched
from tests.trainings import mlp, train

ROOT = Path(__file__).parent.parent
TRAINING = """
import sys, time, torch, gradwatch
from tests.trainings import mlp, train
torch.set_num_threads(1)
model = mlp()
monitor = gradwatch.attach(model, report=None, log=sys.argv[1])
print(monitor.notes, flush=True)
def told(step):
    print(step, time.time(), flush=True)
    time.sleep(0.002)
train(model, torch.optim.SGD(model.parameters(), lr=0.05), int(sys.argv[2]), each=told)
print("end", monitor.notes, flush=True)
"""


def training(folder: Path, steps: int, *before: str) -> subprocess.Popen[str]:
    """Start a training in a process of its own; it prints its notes, each step, and its notes again."""
    command = [*before, sys.executable, "-c", TRAINING, str(folder), str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def test_fifty_killed_runs_lose_a_second_at_most(tmp_path: Path) -> None:
    """Killed at random moments: what their logs hold is whole, without gaps, and lacks the last second at most."""
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT)
    found = json.loads(done.stdout)
    assert len(found) == 50
    assert [one for one in found if not one["whole"]] == []
    assert [one for one in found if not one["due"] <= one["kept"] <= one["made"] + 1] == []
    assert sum(one["due"] for one in found) > 100


def test_a_killed_training_goes_on_in_its_log(tmp_path: Path) -> None:
    """The lock of the dead process is nobody's; the log says that its session has no end."""
    process = training(tmp_path, 100_000)
    assert process.stdout is not None
    steps = []
    for line in process.stdout:
        if line[0].isdigit():
            steps.append(float(line.split()[1]))
        if len(steps) == 500:
            break
    process.send_signal(signal.SIGKILL)
    killed = time.time()
    process.communicate()
    with RunLog(tmp_path) as log:
        kept = log.series().step
        assert log.sessions[0].ended is None
        assert not log.is_written
    assert kept.tolist() == list(range(len(kept)))
    assert len(kept) >= sum(when < killed - 1 for when in steps) > 0
    watched(tmp_path, steps=20)
    with RunLog(tmp_path) as log:
        assert log.series().step.tolist() == list(range(20))


def test_two_processes_cannot_write_one_log(tmp_path: Path) -> None:
    """The second is told who the first is; the first goes on unharmed."""
    process = training(tmp_path, 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(RunLogError, match=rf"being written by process {process.pid} on \S+\. Two processes cannot"):
        gradwatch.attach(mlp(), report=None, log=tmp_path)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_two_monitors_cannot_write_one_log(tmp_path: Path) -> None:
    """Nor in one process; the refused one leaves nothing attached."""
    model = mlp()
    with gradwatch.attach(model, report=None, log=tmp_path):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 3)
        with pytest.raises(RunLogError, match="another monitor of this process"):
            gradwatch.attach(mlp(), report=None, log=tmp_path)


def test_another_models_log_is_refused(tmp_path: Path) -> None:
    """With the first layer that differs."""
    watched(tmp_path, steps=3)
    with pytest.raises(
        RunLogError, match=r"of another model: its layer 0 is '0\.weight', but layer 0 of this model is 'weight'"
    ):
        gradwatch.attach(torch.nn.Linear(3, 3), report=None, log=tmp_path)
    watched(tmp_path, steps=3)  # neither lock nor half a session is left


@pytest.mark.parametrize("log", [3, "", b"runs", ["runs"]])
def test_a_path_that_is_none_is_refused(log: object) -> None:
    """With an example of one."""
    with pytest.raises(gradwatch.UsageError, match='such as "runs/today"'):
        gradwatch.attach(mlp(), report=None, log=log)  # type: ignore[arg-type]


def foreign(path: Path, kind: str) -> None:
    """Put something at ``path`` that is no run log."""
    if kind == "text":
        path.write_text("loss,step\n0.1,2\n")
    elif kind == "pickle":
        torch.save({"a": 1}, path)
    else:
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE songs (name TEXT)")
        db.execute(f"PRAGMA application_id = {0 if kind == 'songs' else 0x47574C47}")
        db.execute("PRAGMA user_version = 99")
        db.commit()
        db.close()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", "not a run log: it begins with b'loss,step"),
        ("pickle", "not a run log: it begins with b'PK"),
        ("songs", "of another program"),
        ("newer", "of format 99; this version of gradwatch supports format 1"),
    ],
)
def test_a_foreign_file_is_told_and_left_alone(kind: str, said: str, tmp_path: Path) -> None:
    """By the reader and by `attach`; not a byte of it changes."""
    path = tmp_path / "run.sqlite"
    foreign(path, kind)
    before = path.read_bytes()
    with pytest.raises(RunLogError, match=said):
        RunLog(tmp_path)
    with pytest.raises(RunLogError, match=said):
        gradwatch.attach(mlp(), report=None, log=tmp_path)
    assert path.read_bytes() == before


def read_all(path: Path) -> None:
    """Read everything that a log can say."""
    with RunLog(path) as log:
        log.series(), log.norms(), log.norms(weight=True), log.sessions
        log.incidents, log.alarms, log.notes, log.history(), log.rules()
        list(log.rows())


def test_a_damaged_file_gives_an_error_in_words(tmp_path: Path) -> None:
    """Bytes overwritten anywhere, or the end cut off: a `RunLogError` or what is left, and nothing else."""
    watched(tmp_path / "run", steps=400, rate=1e6)
    whole = (tmp_path / "run" / "run.sqlite").read_bytes()
    random = np.random.default_rng(0)
    errors = []
    for trial in range(120):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[int(random.integers(20, len(whole))) :]
        else:
            place = int(random.integers(16 if trial % 4 == 1 else 8192, len(whole) - 2000))
            damaged[place : place + int(random.integers(1, 2000))] = random.bytes(int(random.integers(1, 2000)))
        (tmp_path / "run.sqlite").write_bytes(damaged)
        try:
            read_all(tmp_path)
        except RunLogError as error:
            errors.append(str(error))
    assert len(errors) > 30
    assert all("cannot be read: " in one or "is not a run log: " in one or "holds nothing" in one for one in errors)
    assert max(map(len, errors)) < 700


def test_a_disk_that_is_full_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    """On a real file system of 600 KB; what was written before can be read."""
    inside = f'mount -t tmpfs -o size=600k tmpfs "{tmp_path}" && "$@"; cp -rT "{tmp_path}" "{tmp_path}-after"'
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here: unshare is missing or not allowed")
    process = training(tmp_path / "run", 1200, *mounted)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "1199 " in out
    assert said.count("cannot be written") == 1
    assert "database or disk is full" in said
    assert said.count("lacks the last") == 1
    with RunLog(Path(f"{tmp_path}-after") / "run") as log:
        kept = log.series().step
    assert kept.tolist() == list(range(len(kept)))
    assert len(kept) > 50


def test_a_folder_that_cannot_be_written_to_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    """As another user than root, for whom no folder is closed."""
    tmp_path.chmod(0o555)
    user = ["setpriv", "--reuid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
    if user and shutil.which("setpriv") is None:
        pytest.skip("root may write to every folder, and there is no setpriv to be another user")
    opening = [sys.executable, "-S", "-c", "import sys; [open(path) for path in sys.argv[1:]]"]
    needed = [torch.__file__, gradwatch.__file__]
    if user and subprocess.run([*user, *opening, *needed], cwd="/", capture_output=True, check=False).returncode:
        pytest.skip(
            "this clone, or its environment, lies in a folder that only root may enter: another user cannot train in it"
        )
    process = training(tmp_path / "run", 50, *user)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("cannot be written") == out.splitlines()[0].count("cannot be written") == 1
    assert out.splitlines()[-1] == "end " + out.splitlines()[0]
    assert not list(tmp_path.iterdir())


def test_a_log_that_is_removed_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    """Nothing is written to where nobody can find it."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.attach(model, report=None, log=tmp_path / "run", strict=True) as monitor:
        train(model, optimizer, 50)
        assert monitor.flush()
        shutil.rmtree(tmp_path / "run")
        train(model, optimizer, 50)
        assert not monitor.flush()
        train(model, optimizer, 50)
    assert [note for note in monitor.notes if "was removed" in note] == monitor.notes
    assert len(monitor.notes) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["no report", "log lines", "log lines, after the last step"])
def test_what_the_log_has_to_say_stands_once_before_the_summary(
    when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the lines of the report, and through logging only where no report shows it any more."""
    model, lines = mlp(), io.StringIO()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    report = None if when == "no report" else LogReport(lines)
    with gradwatch.attach(model, report=report, log=tmp_path / "run", strict=True) as monitor:
        train(model, optimizer, 50)
        assert monitor.flush()
        shutil.rmtree(tmp_path / "run")
        if not when.endswith("last step"):
            train(model, optimizer, 50)
            assert not monitor.flush()
            train(model, optimizer, 50)
    said = [line for line in lines.getvalue().splitlines() if "was removed" in line and line.startswith("gradwatch |")]
    logged = [record for record in caplog.records if "was removed" in record.getMessage()]
    assert (len(said), len(logged)) == ((1, 0) if when == "log lines" else (0, 1))
    assert len(monitor.notes) == 1


class _SlowStore(Store):
    """A disk that takes its time."""

    def write(self, batches: object) -> None:
        time.sleep(0.05)
        super().write(batches)  # type: ignore[arg-type]


def test_a_slow_disk_takes_no_more_memory(tmp_path: Path) -> None:
    """First only each eighth row keeps its layers, then rows are left out; both is said, and the rest is whole."""
    store = _SlowStore(tmp_path, [(f"{n}", 1, 0, 1) for n in range(100)], {}, Facts())
    told: list[str] = []
    most = 200_000
    writer = Writer(store, told.append, most)
    writer.start()
    held = []
    for start in range(0, 40_000, 32):
        numbers = np.ones(32)
        steps = np.arange(start, start + 32)
        gradient = np.ones((32, 100), dtype=np.float32)
        writer.put(Batch(0.0, Scalars(steps, numbers, numbers, numbers, numbers < 0, numbers, numbers), gradient))
        held.append(writer._bytes)
    writer.close(10.0)
    assert max(held) <= 2 * most + 64 * 32
    assert len(told) == 2
    assert "slower than the training" in told[0]
    assert "lacks" in told[1]
    with RunLog(tmp_path) as log:
        assert len(log.norms()[0]) < len(log.series().step) < 40_000
