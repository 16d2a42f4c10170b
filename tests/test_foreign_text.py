"""Text from outside, where a person reads it: names, errors, notes, run logs of somebody else, terminals of any encoding."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import unicodedata
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch.__main__ import main
from gradwatch.commands.watch import _look
from gradwatch.page.content import content_of
from gradwatch.reports.view import View
from gradwatch.reports.watching import Watching
from gradwatch.runlog import RunLog
from gradwatch.text.printable import printable, writable
from tests import terminal
from tests.test_run_log import watched
from tests.trainings import train

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import RenderableType

FORGED = "gradwatch | step 99 | all is well"
NAMES = (
    "\x1b]0;title\x07\x1b[2J",
    f"w\n{FORGED}",
    "\x9b31mred\x85",
    "[red]b[/red][link=http:||x]l[/link]:bomb:",
    "\u202egnp.\u2066\u200b\ufeff",
    "a\rb\tc\x7f",
)
# what no line may hold: control, formatting and private characters, surrogates
UNFIT = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class Named(gradwatch.Rule):
    """A user's rule, with a name as it comes out of a configuration file."""

    code: ClassVar[str] = "MY\x1b[31m1"
    name: ClassVar[str] = f"[bold]loss[/bold]\n{FORGED}"
    sign: ClassVar[Any] = "growth"
    kind: ClassVar[Any] = "exploding"
    per_layer: ClassVar[bool] = False
    limit: float = 1e3

    def measure(self, history: Any) -> Any:
        """See `gradwatch.Rule`."""
        return np.array([history.row.loss])


class Failing(gradwatch.Report):
    """A user's report whose error is a text from outside."""

    def step(self, snapshot: gradwatch.Snapshot) -> None:
        """See `gradwatch.Report`."""
        raise RuntimeError(f"\x1b[2J\n{FORGED}")


def model_of(names: Sequence[str]) -> nn.Sequential:
    """Return a network whose layers have these names."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for place, name in enumerate(names):
        model._modules[name] = nn.Linear(8, 1 if place == len(names) - 1 else 8)  # add_module would allow no dot
    return model


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training that explodes, with such names everywhere: its folder, log lines, snapshot, what stood on stderr."""
    folder, lines, stderr = tmp_path_factory.mktemp("\x1b[31mruns") / "run", io.StringIO(), io.StringIO()
    model = model_of(NAMES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    report = [gradwatch.reports.LogReport(stream=lines), Failing()]
    kept, sys.stderr = sys.stderr, stderr
    try:
        rules = [*gradwatch.default_rules(), Named()]
        with gradwatch.attach(model, report=report, log=folder, rules=rules, clip="norm") as monitor:
            train(model, optimizer, 70)
            train(model, optimizer, 10, loss_of=lambda x, y: 1e8 * nn.functional.mse_loss(x, y))
            snapshot = monitor._pipeline.snapshot()
    finally:
        sys.stderr = kept
    with sqlite3.connect(folder / "run.sqlite") as db:  # as somebody else's log may be
        db.execute("UPDATE sessions SET host = ?", (f"\x1b[2J\n{FORGED}",))
        db.execute("UPDATE flights SET reason = ?", (f"\u202e\n{FORGED}",))
    db.close()
    return {
        "folder": folder,
        "log lines": lines.getvalue(),
        "flight recorder": stderr.getvalue(),
        "summary": str(monitor.summary()),
        "printed": "\n".join(map(str, [*monitor.incidents, *monitor.alarms])),
        "monitor": monitor,
        "snapshot": snapshot,
    }


def assert_fit(text: str) -> None:
    """Assert that nothing in a text steers a terminal, and that no line is a name's."""
    assert text.strip()
    assert sorted(set(UNFIT.findall(text))) == []
    assert not [line for line in text.splitlines() if line.strip().startswith(FORGED[:30])]


@pytest.mark.parametrize("where", ["log lines", "flight recorder", "summary", "printed"])
def test_a_name_cannot_steer_the_terminal_nor_forge_a_line(where: str, told: dict[str, Any]) -> None:
    """Layers, rules, errors of reports: what cannot be seen stands as Python writes it."""
    assert_fit(told[where])
    assert "\\x1b" in told[where]


def drawn(what: RenderableType, width: int) -> str:
    """Return what a console without colours draws."""
    out = io.StringIO()
    Console(file=out, width=width, height=50, color_system=None, force_terminal=True, legacy_windows=False).print(what)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 79, 160])
def test_the_live_views_show_names_as_they_are_spelled(width: int, told: dict[str, Any]) -> None:
    """Of a training in this process and in another one, layers and incidents; markup is text."""
    pictures = [drawn(View(told["snapshot"]), width)]
    watching = Watching()
    _look(told["folder"], watching)
    pictures.append(drawn(watching.picture(width, 50), width))
    watching.key("i")
    pictures.append(drawn(watching.picture(width, 50), width))
    for picture in pictures:
        assert_fit(picture)
        assert max(map(len, picture.splitlines())) <= width
    assert "[red]b" in drawn(View(told["snapshot"]), 160)


COMMANDS = {
    "report": ["report", "RUN"],
    "list": ["list", "RUNS"],
    "compare": ["compare", "RUN", "RUN"],
    "replay": ["replay", "RUN", "--rule", "GW301.limit=3"],
    "suggest": ["suggest", "RUN"],
    "export": ["export", "RUN", "--to", "csv", "--out", "OUT"],
    "rules": ["rules"],
    "explain": ["explain", "GW203"],
    "report --json": ["report", "RUN", "--json"],
    "compare --json": ["compare", "RUN", "RUN", "--json"],
    "replay --json": ["replay", "RUN", "--json"],
    "list --json": ["list", "RUNS", "--json"],
    "an error": ["report", "RUNS/\x1b[2J\nnone"],
    "a stray layer": ["compare", "RUN", "OTHER"],
}


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    """Return what is typed."""
    other = out / "other"
    if command == "a stray layer":
        watched(other, steps=3)
    places = {"RUN": folder, "RUNS": folder.parent, "OUT": out, "OTHER": other}
    typed = []
    for word in COMMANDS[command]:
        first, slash, rest = word.partition("/")
        typed.append(f"{places.get(first, first)}{slash}{rest}")
    return typed


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_lets_a_run_log_steer_the_terminal(
    command: str, told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever names, hosts and reasons it holds, in tables, lines, JSON and errors."""
    assert main(arguments(command, told["folder"], tmp_path)) == (2 if command.startswith("a") else 0)
    said = capsys.readouterr()
    assert_fit(said.out + said.err)
    if command.startswith("a"):
        assert said.err.startswith("gradwatch: ")
        assert said.err.count("\n") == 1


def test_the_data_keeps_the_true_names(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The history, the log, JSON and exports: a name is escaped for a person's eyes alone."""
    names = [f"{name}.{part}" for name in NAMES for part in ("weight", "bias")]
    monitor = told["monitor"]
    assert list(monitor.history.layers) == names
    assert {layer for one in monitor.incidents for layer in one.layers} <= set(names)
    with RunLog(told["folder"]) as log:
        assert list(log.layers) == names
        assert [one.suspect for one in log.incidents] == [one.suspect for one in monitor.incidents]
    assert main(["report", str(told["folder"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == names
    main(["export", str(told["folder"]), "--to", "csv", "--out", str(tmp_path)])
    import csv

    with (tmp_path / "gradient_norms.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["step", *names]


def test_the_page_shows_names_as_they_are_spelled(told: dict[str, Any], tmp_path: Path) -> None:
    """In its title and in all that it holds of the run."""
    pytest.importorskip("plotly", reason="plotly is an extra: pip install 'gradwatch[report]'")
    assert main(["report", str(told["folder"]), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    held = json.loads(text.split('type="application/json">')[1].partition("</script>")[0])
    with RunLog(told["folder"]) as log:
        assert held["layers"] == [printable(name) for name in log.layers]
        assert len(content_of(log)["layers"]) == len(held["layers"])
    assert UNFIT.findall("".join(strings_of(held))) == []
    assert "<title>run · gradwatch</title>" in text


def strings_of(value: Any) -> list[str]:
    """Return every text in plain values."""
    if isinstance(value, str):
        return [value]
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings_of(part)]


@pytest.mark.parametrize(("layer", "folder"), [("{{script}}", "run"), ("layer", "{{style}}"), ("{{content}}", "{{x}}")])
def test_a_name_is_no_mark_of_the_pages_template(layer: str, folder: str, tmp_path: Path) -> None:
    """The template is filled once: what stands in its place is not looked at again."""
    pytest.importorskip("plotly", reason="plotly is an extra: pip install 'gradwatch[report]'")
    model = model_of([layer])
    with gradwatch.attach(model, report=None, log=tmp_path / folder):
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 5)
    assert main(["report", str(tmp_path / folder), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    held = json.loads(text.split('type="application/json">')[1].partition("</script>")[0])
    assert held["layers"] == [f"{layer}.weight", f"{layer}.bias"]
    assert f"<title>{folder} · gradwatch</title>" in text


def test_every_character_is_shown_or_spelled() -> None:
    """All of Unicode: what is left is visible, once is enough, and what could be read before is not touched."""
    for number in range(sys.maxunicode + 1):
        char = chr(number)
        kind, seen = unicodedata.category(char), printable(char)
        assert seen.isprintable() or kind == "Zs"
        if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            assert seen.isascii()
            assert len(seen) > 1
        elif kind[0] in "LNPS":
            assert seen == char or len(seen) > 1
    assert printable(printable(NAMES[0])) == printable(NAMES[0])
    assert printable("Größe · 重み é µs") == "Größe · 重み é µs"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "shift-jis", "no such encoding"])
def test_what_is_written_can_be_written(encoding: str) -> None:
    """Of any text in any encoding, as wide as it was; what fits stays."""
    known = "ascii" if " " in encoding else encoding
    for text in ("● ▁▂█ µ × …", "Größe 重み", "\udcff", "plain"):
        found = writable(text, encoding)
        found.encode(known)
        assert found[0] == text[0] or cell_len(found[0]) == 1
    assert writable("plain", encoding) == "plain"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("command", [one for one in COMMANDS if one != "a stray layer"])
def test_every_command_speaks_to_streams_of_any_encoding(
    command: str, encoding: str, told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exit code that it has anywhere."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(arguments(command, told["folder"], tmp_path)) == (2 if command == "an error" else 0)
    said = "".join(stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert_fit(said)


def test_log_lines_speak_to_streams_of_any_encoding() -> None:
    """With names that the encoding does not know."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", line_buffering=True)
    model = model_of(["größe"])
    with gradwatch.attach(model, report=gradwatch.reports.LogReport(stream=stream), strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=1e6), 40)
    said = stream.buffer.getvalue().decode("ascii")
    assert "prime suspect gr??e.weight" in said
    assert "us a step" in said


def test_the_live_views_draw_in_a_terminal_of_ascii(told: dict[str, Any]) -> None:
    """The one in the training's process, and the one in another: no error, the lines where they belong."""
    session = terminal.run(
        "import torch; torch.set_num_threads(1); import gradwatch, time\n"
        "from tests.trainings import mlp, train\n"
        "model = mlp()\n"
        "with gradwatch.attach(model, report='live', strict=True):\n"
        "    train(model, torch.optim.SGD(model.parameters(), lr=1e6), 60, each=lambda _: time.sleep(0.02))\n",
        environment={"PYTHONIOENCODING": "ascii"},
    )
    assert session.code == 0
    assert session.raw.isascii()
    assert any("* confirmed" in line for screen in session.screens for line in screen)
    command = ["env", "PYTHONIOENCODING=ascii", sys.executable, "-m", "gradwatch", "watch", str(told["folder"])]
    person = terminal.Person(command)
    person.until("gradwatch *", "q quit")
    person.type("q")
    assert person.leave() == 0
    assert person.raw.isascii()


@pytest.fixture
def nobody_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe whose reader has seen enough."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("command", [*(one for one in COMMANDS if not one.startswith("a")), "report --check"])
@pytest.mark.usefixtures("nobody_reads")
def test_the_exit_code_means_the_same_when_nobody_reads(command: str, told: dict[str, Any], tmp_path: Path) -> None:
    """As it does in `gradwatch report RUN --check | head -1`."""
    if command == "report --check":
        assert main(["report", str(told["folder"]), "--check"]) == 1
    else:
        assert main(arguments(command, told["folder"], tmp_path)) == 0


def test_a_pipe_that_is_closed_at_once_is_no_incident(tmp_path: Path) -> None:
    """In a process of its own: exit code 0 of a run that is well, and nothing on standard error."""
    watched(tmp_path, steps=30)
    command = [sys.executable, "-m", "gradwatch", "report", str(tmp_path), "--check"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_full_disk_behind_standard_output_is_told(tmp_path: Path) -> None:
    """In one line, with exit code 2: what was asked for is not there."""
    watched(tmp_path, steps=30)
    with open("/dev/full", "w") as full:  # noqa: PTH123  a device
        command = [sys.executable, "-m", "gradwatch", "report", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
        both = subprocess.run(command, stdout=full, stderr=full, check=False)
    assert done.returncode == both.returncode == 2
    assert done.stderr.startswith("gradwatch: ")
    assert done.stderr.count("\n") == 1
