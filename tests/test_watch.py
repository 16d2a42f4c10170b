"""`gradwatch watch` in a real terminal, beside a training in another process."""

from __future__ import annotations

import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradwatch.__main__ import main
from gradwatch.commands.keyboard import names_of
from gradwatch.reports.watching import Watching
from gradwatch.runlog import RunLog
from gradwatch.runlog.latest import snapshot_of
from tests.terminal import Person
from tests.test_run_log import watched
from tests.test_run_log_failures import training


def watching(folder: Path, columns: int = 80, rows: int = 24) -> Person:
    """Sit down before `gradwatch watch`, in a process that has imported torch already."""
    script = f"import gradwatch.__main__ as it, sys\nsys.exit(it.main(['watch', {str(folder)!r}]))"
    return Person(script, columns, rows)


def step_of(screen: str) -> int:
    """Return the step in the headline."""
    found = re.search(r"step ([\d,]+)", screen)
    assert found is not None, screen
    return int(found[1].replace(",", ""))


def test_the_view_moves_with_a_training_in_another_process(tmp_path: Path) -> None:
    """It waits for the run to begin, follows it, says when it was killed, and leaves the terminal as it was."""
    person = Person([sys.executable, "-m", "gradwatch", "watch", str(tmp_path / "run")])
    person.until("There is no run log")
    process = training(tmp_path / "run", 100_000)
    first = step_of(person.until("healthy", "Sequential", "0.weight", f"running: process {process.pid}"))
    while step_of("\n".join(person.lines)) < first + 100:
        person.look(0.1)
    process.kill()
    process.communicate()
    last = step_of(person.until("cut off"))
    person.type("q")
    assert person.leave() == 0
    raw = person.raw.decode(errors="replace")
    assert raw.count("\x1b[?1049h") == raw.count("\x1b[?1049l") == 1  # the other screen, and back
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is shown again
    with RunLog(tmp_path / "run") as log:
        assert log.end()[0] >= last >= log.end()[0] - 1000


@pytest.fixture(scope="module")
def exploded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with incidents."""
    folder = tmp_path_factory.mktemp("run")
    watched(folder, rate=30.0, steps=200)
    return folder


def test_keys_move_sort_pause_and_show_incidents(exploded: Path) -> None:
    """Each asks for what its name says."""
    person = watching(exploded)
    person.until("closest to their limits", "ended")
    person.type("n")
    person.until("largest gradient norm")
    person.type("g")
    person.until("largest growth in 64 rows")
    person.type("jj\x1b[B")
    person.type("l")
    person.until("closest to their limits")
    person.type("i")
    screen = person.until("incident 1 of", "do: ")
    with RunLog(exploded) as log:
        assert f"incident 1 of {len(log.incidents)}" in screen
        assert str(log.incidents[0])[:60] in screen
        assert log.incidents[0].evidence[0][:60] in screen
    person.type(" ")
    person.until(" paused ")
    person.type("i ")
    person.until("closest to their limits")
    assert " paused " not in "\n".join(person.lines)
    person.type("\x1b")
    assert person.leave() == 0


def test_the_view_follows_the_size_of_the_window(exploded: Path) -> None:
    """From 80 by 24 to 40 by 10 and 130 by 40; no line is left over."""
    person = watching(exploded)
    person.until("closest to their limits", "space pause")
    person.resize(40, 10)
    person.look(1.0)
    assert all(len(line) <= 40 for line in person.lines)
    assert "space pause" not in "\n".join(person.lines)
    assert "gradwatch" in person.lines[0]
    person.resize(130, 40)
    person.until("sign", "space pause")  # the column of rules is shown from 100 columns on
    person.type("q")
    assert person.leave() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_the_terminal_is_left_clean_by_signals(exploded: Path, number: int, code: int) -> None:
    """Ctrl-C and kill end it as q does."""
    person = watching(exploded)
    person.until("closest to their limits")
    assert person.settings != person.before
    person.process.send_signal(number)
    assert person.leave() == code
    raw = person.raw.decode(errors="replace")
    assert raw.count("\x1b[?1049h") == raw.count("\x1b[?1049l") == 1
    assert person.after == person.before
    assert "Traceback" not in raw


def test_ctrl_z_gives_the_terminal_back_and_fg_returns_to_the_view(exploded: Path) -> None:
    """The screen and its settings are the shell's while it is stopped."""
    person = watching(exploded)
    person.until("closest to their limits")
    person.process.send_signal(signal.SIGTSTP)
    state = Path(f"/proc/{person.process.pid}/stat")
    if not state.exists():
        pytest.skip("there is no /proc here to see that a process is stopped")
    deadline = time.monotonic() + 10
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        person.look(0.05)
    assert person.settings == person.before
    assert person.raw.count(b"\x1b[?1049h") == person.raw.count(b"\x1b[?1049l") == 1
    person.process.send_signal(signal.SIGCONT)
    while person.raw.count(b"\x1b[?1049h") < 2:
        assert time.monotonic() < deadline
        person.look(0.05)
    person.type("n")
    person.until("largest gradient norm")
    person.type("q")
    assert person.leave() == 0
    assert person.raw.count(b"\x1b[?1049l") == 2


def test_without_a_terminal_it_says_what_to_use(exploded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    assert main(["watch", str(exploded)]) == 2
    assert "Use gradwatch report" in capsys.readouterr().err


def test_arrows_come_in_two_spellings() -> None:
    """As terminals send them; an escape alone is a key, and so is each letter."""
    assert names_of("\x1b[A\x1bOB\x1b[6~x\x1b") == ["up", "down", "page down", "x", "escape"]


def test_layers_are_sorted_by_what_was_asked_for(exploded: Path) -> None:
    """Norm and growth, the largest first; what is not finite before all, what is missing last."""
    with RunLog(exploded) as log:
        snapshot = snapshot_of(log)
    count = len(snapshot.layers)
    norms = np.arange(count, dtype=float)
    norms[0] = np.nan
    state = Watching()
    snapshot = replace(snapshot, grad_norm=norms, nonfinite=np.eye(count, dtype=np.uint8)[1])
    state.show(snapshot, -norms, "ended")
    state.key("n")
    assert state._columns(snapshot).tolist() == [1, *range(count - 1, 1, -1), 0]
    state.key("g")
    assert state._columns(snapshot).tolist() == [1, *range(2, count), 0]
    for _ in range(100):
        state.key("down")
    assert state._place == count - 1
    state.key("home")
    state.key("k")
    assert state._place == 0
