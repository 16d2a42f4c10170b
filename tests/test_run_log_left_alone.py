"""What lies beside a run log, or where one was refused, is left as it was: reading destroys nothing, and refusing neither."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import gradwatch
from gradwatch.__main__ import main
from gradwatch.commands.watch import _look
from gradwatch.errors import RunLogError
from gradwatch.monitor import monitor_of
from gradwatch.reports.watching import Watching
from gradwatch.runlog import RunLog
from gradwatch.runlog.lock import WriterLock
from gradwatch.runlog.own import check_files
from gradwatch.runlog.schema import FILE
from tests.test_run_log import watched
from tests.trainings import mlp, train

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
READING = (
    ("report", "RUN"),
    ("report", "RUN", "--html", "OUT/page.html"),
    ("list", "RUN"),
    ("compare", "RUN", "GOOD"),
    ("compare", "GOOD", "RUN"),
    ("replay", "RUN"),
    ("suggest", "RUN"),
    ("export", "RUN", "--to", "csv", "--out", "OUT"),
)
FOREIGN = {
    "text": b"notes of mine\n" * 500,
    "zeros at first": bytes(4096) + b"notes of mine\n" * 500,
    "zeros at first, of whole pages": bytes(2048) + b"notes of mine...\n" * 120 + bytes(4096 - 2048 - 17 * 120),
    "magic of a few bytes": b"\x37\x7f\x06\x82notes of mine" * 100,
}
KILLED = """
import os, signal, sys, time, torch, gradwatch
from tests.trainings import mlp, train
torch.set_num_threads(1)
model = mlp()
monitor = gradwatch.attach(model, report=None, log=sys.argv[1])
train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
# asks for the lock that SQLite has on a database as long as it is open (see "pending_byte" in its os.h), as a checkpoint does
ASKING = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("held")
"""


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of each file below a folder; of SQLite's shared memory that it is there."""
    return {
        str(path.relative_to(folder)): (b"", 0)
        if path.name.endswith("-shm")
        else (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@functools.cache
def killed_once() -> dict[str, bytes]:
    """Kill a training in a process of its own; return the files of its log by name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", KILLED, folder], env=environment, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def killed(folder: Path) -> Path:
    """Leave the log of a training that was killed: what it holds is still in SQLite's write-ahead log."""
    folder.mkdir(exist_ok=True)
    for name, written in killed_once().items():
        (folder / name).write_bytes(written)
    assert (folder / f"{FILE}-wal").stat().st_size > 0
    return folder


def held(database: Path) -> bool:
    """True when this process has SQLite's lock on a database, as another process sees it."""
    asked = subprocess.run([sys.executable, "-c", ASKING, str(database)], capture_output=True, text=True, check=True)
    return asked.stdout == "held\n"


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_reading_leaves_a_foreign_file_beside_a_log_alone(
    suffix: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command that reads says whose file it is, and not a byte of it changes."""
    watched(tmp_path / "run", steps=5)
    watched(tmp_path / "good", steps=5)
    foreign = tmp_path / "run" / f"{FILE}{suffix}"
    foreign.write_bytes(FOREIGN[kind])
    before = content(tmp_path / "run")
    places = {"RUN": tmp_path / "run", "GOOD": tmp_path / "good"}
    for command in READING:
        typed = [str(places.get(word, word)).replace("OUT", str(tmp_path / "out")) for word in command]
        assert main(typed) == (0 if command[0] == "list" else 2), command
        said = capsys.readouterr()
        assert "belongstoanotherprogram" in "".join((said.out + said.err).split()), command
    _look(tmp_path / "run", Watching())
    assert foreign.read_bytes() == FOREIGN[kind]
    assert content(tmp_path / "run") == before


def test_what_sqlite_itself_left_is_read(tmp_path: Path) -> None:
    """After a kill, also with its shared memory gone, blank as it is made, or cut to the first three bytes."""
    killed(tmp_path / "run")
    shared = tmp_path / "run" / f"{FILE}-shm"
    whole = shared.read_bytes()
    for left in (whole, None, bytes(3), bytes(4096), bytes(32768), bytes(48) + whole[48:]):
        shared.unlink(missing_ok=True)
        if left is not None:
            shared.write_bytes(left)
        with RunLog(tmp_path / "run") as log:
            assert log.series().step.tolist() == list(range(20))
    watched(tmp_path / "run", steps=20)
    with RunLog(tmp_path / "run") as log:
        assert len(log.sessions) == 2


def test_a_journal_that_sqlite_has_begun_is_its_own(tmp_path: Path) -> None:
    """As a process that is killed leaves it, before its magic number is on the disk and after."""
    database = tmp_path / "run" / FILE
    watched(tmp_path / "run", steps=5)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE norms SET keep = keep + 1, gradient = zeroblob(100000)")
        copied = Path(f"{database}-journal").read_bytes()
        db.execute("ROLLBACK")
    assert len(copied) > 512
    for beginning in (copied[:12], bytes(12)):
        Path(f"{database}-journal").write_bytes(beginning + copied[12:])
        check_files(database)


def test_a_reader_in_the_trainings_own_process_takes_no_lock_away(tmp_path: Path) -> None:
    """Nor does one that is refused: another process still finds it held."""
    model, run = mlp(), tmp_path / "run"
    with gradwatch.attach(model, report=None, log=run) as monitor:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 20)
        assert held(run / FILE)
        with RunLog(run) as log, RunLog(run / FILE) as other:
            assert log.is_written
            assert other.layers == log.layers
        (tmp_path / "link").symlink_to(run)
        RunLog(tmp_path / "link").close()
        with pytest.raises(RunLogError, match="another monitor of this process"):
            gradwatch.attach(mlp(), report=None, log=run)
        assert held(run / FILE)
        second = subprocess.run(
            [sys.executable, "-c", KILLED, str(run)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f"being written by process {os.getpid()}" in second.stderr
        assert not monitor.notes
    with RunLog(run) as log:
        assert log.series().step.tolist() == list(range(20))


def foreign_database(folder: Path) -> None:
    """Put another program's database in the place of a log."""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("CREATE TABLE songs (name TEXT)")
        db.commit()


def foreign_and_open(folder: Path) -> None:
    """The same, in the mode in which SQLite keeps files beside it."""
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE songs (name TEXT)")
        db.commit()


def newer(folder: Path) -> None:
    """Put a log of a later version there."""
    watched(folder, steps=3)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA user_version = 99")


def without_a_table(folder: Path) -> None:
    """Put a damaged log there."""
    watched(folder, steps=3)
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("DROP TABLE norms")
        db.commit()


REFUSED: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: (folder / FILE).write_text("a,b\n"),
    "database of another program": foreign_database,
    "database of another program in the mode of a log": foreign_and_open,
    "later version": newer,
    "damaged": without_a_table,
    "companion of another program": lambda folder: (folder / f"{FILE}-shm").write_text("notes"),
    "link": lambda folder: (folder / FILE).symlink_to(folder.parent / "nothing"),
    "another model": lambda folder: watched(folder, steps=3),
    "another model, killed": killed,
    "another model, killed and copied without shared memory": lambda folder: (killed(folder) / f"{FILE}-shm").unlink(),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("locked", [True, False], ids=["with a lock's file", "without one"])
def test_what_was_refused_is_as_it_was(kind: str, locked: bool, tmp_path: Path) -> None:
    """To the byte and to the second, by `attach` and by the reader: no lock's file is left, and an old one says what it did."""
    run = tmp_path / "run"
    run.mkdir()
    REFUSED[kind](run)
    (run / "writer.lock").unlink(missing_ok=True)
    if locked:
        (run / "writer.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    before = content(tmp_path)
    model = torch.nn.Linear(3, 3)
    for _ in range(2):
        with pytest.raises(RunLogError):
            gradwatch.attach(model, report=None, log=run)
        assert content(tmp_path) == before
    assert monitor_of(model) is None
    if not kind.startswith("another model"):
        with pytest.raises(RunLogError):
            RunLog(run)
        assert content(tmp_path) == before


def test_folders_made_for_a_log_that_cannot_be_are_removed(tmp_path: Path) -> None:
    """Those above it too; what was there stays."""
    (tmp_path / "there").mkdir()
    with pytest.raises(RunLogError, match="File name too long"):
        gradwatch.attach(mlp(), report=None, log=tmp_path / "there" / "a" / "b" / ("x" * 300))
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


FULL = """
import contextlib, torch, gradwatch
from tests.trainings import mlp, train
with contextlib.suppress(OSError), open("{disk}/full", "wb", buffering=0) as file:
    while file.write(bytes(1024)):
        pass
model = mlp()
with gradwatch.attach(model, report=None, log="{disk}/runs/run") as monitor:
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), 3)
    told = any("cannot be written" in note for note in monitor.notes)
    print(len(monitor.history.steps()), "rows, told:", told, flush=True)
"""


def test_a_disk_without_room_is_left_as_it_was(tmp_path: Path) -> None:
    """On a real file system that is full from the start: training goes on without a log."""
    inside = f'mount -t tmpfs -o size=64k tmpfs "{tmp_path}" && "$@"; ls -R "{tmp_path}"'
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here: unshare is missing or not allowed")
    program = FULL.format(disk=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*mounted, sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3 rows, told: True" in done.stdout
    assert done.stdout.endswith(f"{tmp_path}:\nfull\n")


IMPOSSIBLE: dict[str, Callable[[Path], str]] = {
    "NUL": lambda folder: f"{folder}/a\0b",
    "half of a pair": lambda folder: f"{folder}/\ud800",
    "300 characters": lambda folder: f"{folder}/{'x' * 300}",
    "5000 characters": lambda folder: f"{folder}/{'long/' * 1000}",
    "below a file": lambda folder: f"{folder}/file/run",
    "deep below a file": lambda folder: f"{folder}/file/a/b",
    "a file": lambda folder: f"{folder}/file",
    "a link to nothing": lambda folder: f"{folder}/dangling",
    "links in a circle": lambda folder: f"{folder}/circle/run",
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("before", [True, False], ids=["a model that is watched", "a new model"])
def test_a_path_that_cannot_be_is_told_in_words(kind: str, before: bool, tmp_path: Path) -> None:
    """What happened, the value, what was expected, what to do; nothing is left attached or made, an old monitor goes on."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "circle").symlink_to(folder / "circle")
    made, model = sorted(folder.rglob("*")), mlp()
    old = gradwatch.attach(model, report=None, log=tmp_path / "old") if before else None
    with pytest.raises(RunLogError) as raised:
        gradwatch.attach(model, report=None, log=IMPOSSIBLE[kind](folder))
    said = str(raised.value)
    assert "xpected" in said
    assert str(folder)[:20] in said
    assert "ive another path" in said or "does not exist yet" in said
    assert monitor_of(model) is old
    assert sorted(folder.rglob("*")) == made
    if old is not None:
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 3)
        assert len(old.history.steps()) == 3
        old.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_reader_says_of_no_path_that_it_was_damaged(kind: str, tmp_path: Path) -> None:
    """It says that there is no log, or why it cannot be looked for."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(RunLogError) as raised:
        RunLog(IMPOSSIBLE[kind](tmp_path))
    if kind != "a file":
        assert "damaged" not in str(raised.value)


HOLDING = """
import sys, time
from pathlib import Path
from gradwatch.runlog.lock import WriterLock
lock = WriterLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(0.1)
lock.undo()
sys.stdin.readline()
WriterLock(Path(sys.argv[1]))
"""


def test_a_lock_whose_file_is_removed_while_it_is_waited_for_is_none(tmp_path: Path) -> None:
    """Who waits for a process that is then refused gets a lock that this process sees when it comes again."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        own = WriterLock(tmp_path)
        _, said = other.communicate("\n", timeout=60)
    assert f"being written by process {os.getpid()}" in said
    own.release()
    assert (tmp_path / "writer.lock").exists()
