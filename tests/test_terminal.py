"""The live report in real terminals: what stands there in the end, whatever else is written and drawn."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console, Group

from gradwatch.reports.screen import Screen, _headlines, pause_after
from tests import terminal
from tests.terminal import EXPLODING
from tests.test_reports import drawn as drawn_on
from tests.test_reports import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradwatch.records import Snapshot

PICTURE = "of limit"


def drawn(session: terminal.Session) -> bool:
    """Return whether the picture was seen."""
    return PICTURE in session.raw


def told(session: terminal.Session) -> list[str]:
    """Return the lines that are neither gradwatch's nor blank."""
    end = session.everything.partition("\ngradwatch ")[0]
    return [line for line in end.splitlines() if line]


@pytest.mark.parametrize(("columns", "rows"), [(200, 60), (40, 24)])
def test_the_live_report_in_a_real_terminal(columns: int, rows: int) -> None:
    """It draws at the foot, prints stay above it in order, and the summary takes its place at the end."""
    session = terminal.run(
        EXPLODING
        + """
short = False
gradwatch.attach(model, clip="norm")
for step in steps(range(300)):
    if step % 50 == 0:
        print("printed at", step)
""",
        columns,
        rows,
    )
    assert session.code == 0
    live = [screen for screen in session.screens if any(PICTURE in line for line in screen)]
    assert live
    assert any("auto-clip on" in line for screen in live for line in screen)
    printed = [line for line in session.everything.splitlines() if line.startswith("printed at")]
    assert printed == [f"printed at {step}" for step in range(0, 300, 50)]
    assert PICTURE not in session.everything
    assert "300 steps of Sequential" in " ".join(session.everything.split())
    assert "exploding resolved" in session.everything
    assert "\x1b[?25l" not in session.raw  # a cursor that was never hidden is there also after kill -9


def test_no_color_is_honoured() -> None:
    """No colour code reaches the terminal, the picture does."""
    session = terminal.run(
        EXPLODING + "gradwatch.attach(model)\nfor _ in steps(range(150)): pass\n", environment={"NO_COLOR": "1"}
    )
    assert drawn(session)
    assert not re.search(r"\x1b\[[\d;]*(3[0-8]|9\d)[\d;]*m", session.raw)
    assert "exploding" in session.everything


@pytest.mark.parametrize("name", ["auto", "live"])
def test_a_terminal_that_cannot_move_its_cursor_gets_log_lines(name: str) -> None:
    """No escape code in ``TERM=dumb``; who asked for the picture is told."""
    session = terminal.run(
        EXPLODING + f"gradwatch.attach(model, report={name!r})\nfor _ in steps(range(110)): pass\n",
        environment={"TERM": "dumb"},
    )
    assert "\x1b" not in session.raw
    assert "gradwatch | step 100 | exploding" in session.everything
    assert session.everything.count("this terminal cannot move its cursor: log lines instead") == (name == "live")


LINES = """
import sys, logging
held = sys.stderr
logging.basicConfig(level=logging.INFO, format="%(message)s")
from rich import print as rich_print
from rich.console import Console
console = Console(file=sys.stderr)
gradwatch.attach(model)
for step in steps(range(60)):
    if step % 20 == 0:
        logging.info("logged %d", step)
        print("held", step, file=held)
        rich_print("rich", step)
        console.print("console", step)
        sys.stdout.writelines([f"lines {step}", "\\n", f"and {step}\\n"])
        print("no newline", step, end="", flush=True)
    if step % 20 == 10:
        print(" and its end", step)
"""


def test_whoever_holds_the_stream_since_before_writes_above_the_picture() -> None:
    """A logging handler, a saved reference, rich's own consoles; lines whole and in order, all of them."""
    session = terminal.run(EXPLODING + LINES)
    assert drawn(session)
    expected = []
    for step in (0, 20, 40):
        expected += [f"{word} {step}" for word in ("logged", "held", "rich", "console", "lines", "and")]
        expected += [f"no newline {step} and its end {step + 10}"]
    assert told(session) == expected


BARS = """
import sys
gradwatch.attach(model)
before = 0
for epoch in range(3):
    for step in steps(range(30)):
        bar = f"{step + 1}/30 [{'=' * step}>{'.' * (29 - step)}] loss {step}"
        if %r:
            bar = "\\x1b[1m" + bar + "\\x1b[0m"
            sys.stdout.write("\\b" * before + "\\r" + bar + " " * max(0, before - len(bar)))
            before = len(bar)
        else:
            sys.stdout.write("\\r" + bar)
        sys.stdout.flush()
    print()
    print("epoch", epoch, "is over")
"""


@pytest.mark.parametrize("keras", [False, True])
def test_bars_made_by_hand_come_out_in_order_and_whole(*, keras: bool) -> None:
    """With a carriage return, and as Keras draws its bar with backspaces and colours."""
    session = terminal.run(EXPLODING + BARS % keras)
    assert drawn(session)
    bar = f"30/30 [{'=' * 29}>] loss 29"
    assert told(session) == [line for epoch in range(3) for line in (bar, f"epoch {epoch} is over")]


@pytest.mark.parametrize("first", ["monitor", "bar"])
def test_tqdm_runs_beside_it(first: str) -> None:
    """A bar that starts later stays above the picture; where one runs already there are log lines instead."""
    attach = "gradwatch.attach(model)\n"
    bar = "from tqdm import tqdm\nbar = tqdm(range(200), desc='train')\n"
    session = terminal.run(
        EXPLODING + (attach + bar if first == "monitor" else bar + attach) + "for _ in steps(bar): pass\n"
    )
    assert session.code == 0
    assert any("train: 100%" in line for line in session.everything.splitlines())
    assert session.everything.count("train:") <= 2
    assert "exploding" in session.everything
    assert drawn(session) is (first == "monitor")
    assert session.everything.count("a progress bar is running: log lines instead") == (first == "bar")


def test_lines_printed_while_bars_of_tqdm_run_stand_above_them() -> None:
    """Nested bars, prints, log lines of the same stream and `tqdm.write`: each line whole, one bar in the end."""
    session = terminal.run(
        EXPLODING
        + """
import logging
from tqdm import tqdm
logging.basicConfig(level=logging.INFO, format="%(message)s")
gradwatch.attach(model)
for epoch in tqdm(range(2), desc="epochs"):
    for step in steps(tqdm(range(40), desc="steps", leave=False)):
        if step % 20 == 0:
            print("printed", step)
            logging.info("logged %d", step)
            tqdm.write(f"written {step}")
"""
    )
    assert drawn(session)
    *lines, bar = told(session)
    assert lines == [f"{word} {step}" for step in (0, 20, 0, 20) for word in ("printed", "logged", "written")]
    assert bar.startswith("epochs: 100%")


RICH = """
from rich.progress import Progress
from rich.console import Console
%s
with Progress(console=Console(%s)) as progress:
    task = progress.add_task("train", total=120)
    %s
    for step in steps(range(120)):
        progress.update(task, advance=1)
        if step %% 40 == 0:
            print("printed", step)
"""


@pytest.mark.parametrize(("first", "file"), [("monitor", ""), ("monitor", "stderr=True"), ("progress", "")])
def test_another_live_display_makes_the_picture_give_way_to_log_lines(first: str, file: str) -> None:
    """Rich's Progress, as Lightning's `RichProgressBar` draws it: said once, its bar and the prints are whole."""
    attach = "gradwatch.attach(model)"
    session = terminal.run(
        EXPLODING + RICH % ((attach, file, "pass") if first == "monitor" else ("", file, attach)), 160, 50
    )
    assert session.code == 0
    assert PICTURE not in session.everything
    assert session.everything.count("another live display is running: log lines instead of the live picture") == 1
    assert session.everything.count("train ━") == 1
    assert [line for line in session.everything.splitlines() if line.startswith("printed")] == [
        f"printed {step}" for step in (0, 40, 80)
    ]
    assert session.everything.count("gradwatch | step 100 | exploding suspected") <= 1
    assert "gradwatch | step 100 | " in session.everything
    assert "120 steps of Sequential" in session.everything


def test_a_display_on_a_console_of_its_own_is_noticed_while_the_picture_is_drawn() -> None:
    """Rich's Status, which shows a spinner, begins in the middle of the training: from then on there are log lines."""
    session = terminal.run(
        EXPLODING
        + """
from rich.console import Console
console = Console(stderr=True)
gradwatch.attach(model)
for _ in steps(range(60)): pass
with console.status("spinning"):
    for _ in steps(range(120)): pass
""",
        160,
        50,
    )
    assert drawn(session)
    assert PICTURE not in session.everything
    assert session.everything.count("log lines instead of the live picture") == 1
    assert "gradwatch | step 160 | " in session.everything


def test_what_passes_by_the_streams_stays_on_the_terminal() -> None:
    """Lines of C code and of another process, one at a time, and those of a process that was forked."""
    session = terminal.run(
        EXPLODING
        + """
import os, subprocess
gradwatch.attach(model)
for step in steps(range(160)):
    time.sleep(0.01)
    if step == 40:
        os.write(2, b"from C\\n")
    if step == 80:
        subprocess.run("echo from another process", shell=True)
    if step == 120 and not os.fork():
        print("from a fork", flush=True)
        os._exit(0)
    if step == 155:
        print("printed")
"""
    )
    assert drawn(session)
    assert told(session) == ["from C", "from another process", "from a fork", "printed"]


def person(script: str, **settings: int) -> terminal.Person:
    """Start a training at a terminal at which a person sits."""
    return terminal.Person(EXPLODING + script, **settings)


LOOP = """
for step in steps(range(-100_000, 0)):
    time.sleep(0.01)
    if step == -100_000 + 30:
        print("printed")
"""


@pytest.mark.parametrize(
    "script",
    [
        "gradwatch.attach(model)" + LOOP,
        "with gradwatch.attach(model):" + LOOP.replace("\n", "\n    "),
        "gradwatch.attach(model)\ntry:" + LOOP.replace("\n", "\n    ") + "\nexcept KeyboardInterrupt: pass\n",
    ],
    ids=["bare", "with", "caught"],
)
def test_ctrl_c_leaves_the_terminal_clean_with_the_summary(script: str) -> None:
    """No line of the picture is left, nothing is drawn after it, whatever the program does with the interrupt."""
    sat = person(script, rows=100)  # the traceback is long if the interrupt comes while gradwatch judges
    sat.until("printed", PICTURE)
    sat.look(0.3)
    sat.type("\x03")
    sat.leave()
    screen = "\n".join(sat.lines)
    assert PICTURE not in screen
    assert "steps/s" not in screen
    assert screen.count("● healthy") == 0
    assert screen.count("gradwatch healthy:") == 1
    if "except" not in script:
        assert sat.process.returncode == -2
        assert "KeyboardInterrupt" in sat.lines  # the end of its traceback, whose beginning may have left the screen


def test_a_prompt_is_left_alone_while_it_waits() -> None:
    """What `input` asks and what is typed stay where they are."""
    sat = person(
        """
gradwatch.attach(model)
for step in steps(range(60)):
    time.sleep(0.01)
    if step == 40:
        print("answered", input("which one? "))
"""
    )
    sat.until("which one?", PICTURE)
    sat.type("the second")
    sat.look(0.8)
    assert "which one? the second" in "\n".join(sat.lines)
    sat.type("\n")
    assert sat.leave() == 0
    lines = [line for line in sat.lines if line]
    assert lines[:2] == ["which one? the second", "answered the second"]
    assert lines[2].startswith("gradwatch healthy")


def test_the_picture_follows_the_terminals_size(tmp_path: Path) -> None:
    """In tmux, which wraps lines anew as terminals do: one picture, of the new width, and the prints are whole."""
    program = shutil.which("tmux")
    if program is None:
        pytest.skip("needs tmux: other emulators do not wrap lines anew")
    (tmp_path / "train.py").write_text(EXPLODING + "gradwatch.attach(model)" + LOOP)
    socket = str(tmp_path / "socket")

    def tmux(*words: str) -> str:
        done = subprocess.run([program, "-S", socket, "-f", "/dev/null", *words], capture_output=True, check=True)
        return done.stdout.decode()

    size = ["-x", "80", "-y", "24"]
    tmux("new-session", "-d", *size, f"PYTHONPATH={sys.path[0]} {sys.executable} {tmp_path / 'train.py'}")
    try:
        for columns, rows in ((80, 24), (50, 20), (120, 30)):
            tmux("resize-window", "-x", str(columns), "-y", str(rows))
            screen = eventually(lambda: tmux("capture-pane", "-p"), columns)
            assert tmux("capture-pane", "-p", "-S", "-").startswith("printed\n")
            assert screen.count(PICTURE) == 1
            assert screen.count("● healthy") == 1
    finally:
        tmux("kill-server")


def eventually(look: Callable[[], str], columns: int) -> str:
    """Look until the curves are as wide as the terminal."""
    deadline = time.monotonic() + 30
    while True:
        screen = look()
        if any(line.startswith("global norm") and len(line) == columns for line in screen.splitlines()):
            return screen
        assert time.monotonic() < deadline, screen
        time.sleep(0.1)


@pytest.mark.parametrize("redirected", ["stdout", "stderr"])
def test_one_stream_may_be_redirected(redirected: str, tmp_path: Path) -> None:
    """The picture is on the terminal when standard error is; what is redirected is the program's own, byte for byte."""
    file = tmp_path / "file"
    session = terminal.run(
        f"import sys; kept = sys.{redirected}; sys.{redirected} = open({str(file)!r}, 'w')\n"
        + EXPLODING
        + """
gradwatch.attach(model)
for step in steps(range(60)):
    if step % 20 == 0:
        print("printed", step)
        print("erred", step, file=sys.stderr)
"""
    )
    content = file.read_text()
    assert drawn(session) is (redirected == "stdout")
    assert "\x1b" not in content
    if redirected == "stdout":
        assert content == "printed 0\nprinted 20\nprinted 40\n"
        assert told(session) == ["erred 0", "erred 20", "erred 40"]
    else:
        assert [line for line in content.splitlines() if line.startswith("erred")] == [
            "erred 0",
            "erred 20",
            "erred 40",
        ]
        assert "60 steps of Sequential" in content
        assert session.everything.split("\n")[:3] == ["printed 0", "printed 20", "printed 40"]


def test_the_streams_are_as_they_were_after_detach() -> None:
    """The same objects, without an attribute more; and while it draws they are the same objects too."""
    session = terminal.run(
        EXPLODING
        + """
import sys
streams, before = (sys.stdout, sys.stderr), [dict(vars(sys.stdout)), dict(vars(sys.stderr))]
monitor = gradwatch.attach(model)
for _ in steps(range(40)): pass
assert streams == (sys.stdout, sys.stderr) and sys.stdout.fileno() == 1
monitor.detach()
assert before == [vars(sys.stdout), vars(sys.stderr)]
print("the same")
"""
    )
    assert session.code == 0, session.everything
    assert drawn(session)
    assert "the same" in session.everything


PAIR = (
    EXPLODING
    + """
other = nn.Sequential(nn.Linear(8, 1))
opt2 = torch.optim.SGD(other.parameters(), lr=0.01)
def both(n):
    for step in steps(n):
        opt2.zero_grad(); nn.functional.mse_loss(other(x), y).backward(); opt2.step()
        yield step
first = gradwatch.attach(model, name="generator")
second = gradwatch.attach(other, name="critic")
"""
)


def heads(screen: list[str]) -> list[str]:
    """Return the names of the runs of which a screen shows the picture, from top to bottom."""
    return [line.split()[1] for line in screen if re.match(r"gradwatch \w+ ● ", line)]


def test_two_models_share_one_picture() -> None:
    """One below the other, with their names; prints stay above, and each summary is written where its run ends."""
    session = terminal.run(
        PAIR
        + """
for step in both(range(150)):
    if step % 10 == 0: print("line", step)
first.detach()
print("between")
for step in both(range(150, 450)): pass
second.detach()
"""
    )
    assert session.code == 0
    assert ["generator", "critic"] in [heads(screen) for screen in session.screens]
    assert ["critic"] in [heads(screen) for screen in session.screens]
    assert all(heads(screen) in ([], ["generator"], ["generator", "critic"], ["critic"]) for screen in session.screens)
    assert "log lines instead" not in session.everything
    left = [line for line in session.everything.splitlines() if line]
    assert [line for line in left if line.startswith("line")] == [f"line {step}" for step in range(0, 150, 10)]
    firsts = [
        left.index(next(line for line in left if start in line)) for start in ("of generator", "between", "of critic")
    ]
    assert firsts == sorted(firsts)
    assert "150 steps of generator (Sequential)" in session.everything
    assert "450 steps of critic (Sequential)" in session.everything
    assert heads(session.last) == []
    assert not any("closest to their limits" in line for line in session.last)


@pytest.mark.parametrize("rows", [24, 10, 6])
def test_a_picture_of_two_fits_any_terminal(rows: int) -> None:
    """In a small one, each run has its headline."""
    session = terminal.run(PAIR + "for _ in both(range(60)): pass\nfirst.detach(); second.detach()", rows=rows)
    seen = [screen for screen in session.screens if heads(screen) == ["generator", "critic"]]
    assert seen
    losses = [sum(line.startswith("loss  ") for line in screen) for screen in seen]
    assert max(losses) == (2 if rows >= 10 else 0)


def test_runs_of_which_there_is_no_room_are_counted() -> None:
    """The worst come first."""
    shown = [replace(snapshot(1), verdict=verdict) for verdict in ("healthy", "confirmed", "healthy", "suspected")]
    lines = drawn_on(Group(*_headlines(shown, 60, 3)), 60, 24)
    assert [line.partition("  ")[0] for line in lines] == [
        "gradwatch ● confirmed",
        "gradwatch ● suspected",
        "and 2 more runs",
    ]


@pytest.mark.parametrize(("took", "pause"), [(0.0, 0.0), (0.006, 0.6), (0.1, 2.0)])
def test_drawing_takes_a_hundredth_of_the_time(took: float, pause: float) -> None:
    """But a picture never holds up the next one by more than two seconds."""
    assert pause_after(took) == pytest.approx(pause)


def pictures_of(shown: list[Snapshot], number: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Return the verdict and the time of the first pictures, each of 40 ms; the last snapshot is shown on and on."""
    pictures: list[tuple[str, float]] = []

    def slow(_: Screen, snapshots: list[Snapshot]) -> list[str]:
        end = time.thread_time() + 0.04
        while time.thread_time() < end:
            pass
        pictures.append((snapshots[0].verdict, time.monotonic()))
        return ["a picture"]

    monkeypatch.setattr(Screen, "_picture", slow)
    screen, run = Screen(Console(file=io.StringIO(), force_terminal=True)), object()
    screen.join(run)
    end = time.monotonic() + 30
    while len(pictures) < number and time.monotonic() < end:
        screen.show(run, shown[min(len(pictures), len(shown) - 1)])
        time.sleep(0.01)
    screen.leave(run)
    return pictures[:number]


def test_a_picture_that_takes_long_is_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one of 40 ms, nothing is drawn for two seconds, although each step is new."""
    (_, first), (_, second) = pictures_of([snapshot(1)], 2, monkeypatch)
    assert second - first > 2.0


def test_an_alarm_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the time of the next picture; the one after it waits twice as long, so that no more is drawn."""
    shown = [replace(snapshot(1), verdict=verdict) for verdict in ("healthy", "confirmed")]
    pictures = pictures_of(shown, 3, monkeypatch)
    assert [verdict for verdict, _ in pictures] == ["healthy", "confirmed", "confirmed"]
    first, second, third = (moment for _, moment in pictures)
    assert third - first > 4.0
    assert third - second > 2 * (second - first)


def test_runs_that_share_a_picture_give_way_together() -> None:
    """Another live display starts: that is said once, and both go on in lines with their names."""
    session = terminal.run(
        PAIR
        + """
from rich.status import Status
for _ in both(range(40)): pass
with Status("busy"):
    for _ in both(range(40, 120)): pass
first.detach(); second.detach()
"""
    )
    assert session.code == 0
    assert session.everything.count("another live display is running: log lines instead") == 1
    assert "gradwatch | generator | step 100 | exploding" in session.everything
    assert "120 steps of critic" in session.everything
    assert PICTURE not in session.everything


def test_one_run_that_fails_leaves_the_picture_to_the_other() -> None:
    """Its report is switched off and noted; the streams are restored when the other ends."""
    session = terminal.run(
        PAIR
        + """
import sys
from gradwatch.reports.live import LiveReport
step_of = LiveReport.step
for _ in both(range(30)): pass
def failing(self, snapshot):
    if snapshot.facts.name == "generator": raise RuntimeError("broken")
    step_of(self, snapshot)
LiveReport.step = failing
for _ in both(range(30, 330)): pass
first.detach(); second.detach()
print(vars(sys.stdout).get("write"), vars(sys.stderr).get("write"))
"""
    )
    assert session.code == 0
    assert ["critic"] in [heads(screen) for screen in session.screens]
    assert "330 steps of critic" in session.everything
    assert session.everything.rstrip().endswith("None None")
