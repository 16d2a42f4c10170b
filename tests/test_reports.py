"""What the reports draw, whole, at fixed sizes; and log lines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch import device
from gradwatch.records import Alarm, ClipRecord, Facts, Incident, Provenance, Snapshot
from gradwatch.reports.log import LogReport
from gradwatch.reports.names import shorten
from gradwatch.reports.sparkline import BLOCKS, NOT_FINITE, sparkline
from gradwatch.reports.summary import Summary
from gradwatch.reports.view import View, brief
from tests.terminal import EXPLODING

LONG = "encoder.blocks.11.attention.projection.[red]weight[/red]." + "x" * 63


def snapshot(layers: int = 300, **changes: object) -> Snapshot:
    """Return a snapshot of an explosion in a model with many layers."""
    alarm = Alarm("GW301", "gradient norm surges", "growth", "exploding", LONG, 95, 31.0, 10.0)
    incident = Incident(
        kind="exploding",
        severity="critical",
        verdict="confirmed",
        opened_step=95,
        confirmed_step=97,
        suspect=LONG,
        layers=(LONG, "head.bias"),
        signs=(alarm,),
        evidence=(str(alarm),),
        advice=("Lower the learning rate (now 0.1), or warm it up.",),
        clip=ClipRecord("ClipNorm(max_norm=1.0)", 95, clipped=5, steps=5, norm_before=412.0),
    )
    names = (LONG, *(f"blocks.{n}.weight" for n in range(layers - 1)))
    growth = np.concatenate([np.full(95, 0.5), 0.5 * 3.0 ** np.arange(5)])
    values = {
        "facts": Facts(model="Transformer", layers=layers, parameters=10**8, optimizer="SGD", rate=0.1),
        "step": 99,
        "layers": names,
        "loss": growth,
        "global_norm": np.append(growth, np.nan),
        "nonfinite": np.zeros(layers, dtype=np.uint8),
        "grad_norm": np.linspace(40, 0.1, layers),
        "weight_norm": np.linspace(3, 1, layers),
        "closeness": np.linspace(3.1, 0.01, layers),
        "closest": np.zeros(layers, dtype=np.intp),
        "rules": ("GW301 gradient norm surges",),
        "firing": ("GW301 gradient norm surges",),
        "incidents": (incident,),
        "verdict": "confirmed",
        "clipping": "ClipNorm(max_norm=1.0)",
        "clip_on": True,
        "clipped": 5,
        "skipped": 0,
        "seconds": 12.0,
        "steps_per_second": 1234.0,
        "cost_us": 62.0,
        "provenance": Provenance(loss="backward root"),
        "news": (incident,),
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def drawn(shown: object, width: int, height: int) -> list[str]:
    """Draw on a console of this size; return its lines."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_view_at_80_by_24() -> None:
    """The whole picture, as a user sees it."""
    lines = drawn(View(snapshot()), 80, 24)
    assert lines[0] == "gradwatch ● confirmed  step 99  Transformer  SGD 0.1"
    assert lines[1] == "loss             40.5 " + "▁" * 54 + "▃▅▆█"
    assert lines[2].startswith("global norm       NaN ▁")
    assert lines[2].endswith("×")
    assert lines[3] == "closest to their limits                           gradient weight of limit"
    assert lines[4] == "encoder.blocks…xxxxxxxxxxxxxxxxxxxxxxxxxxxxx            40      3 ████████ 3.10"
    assert lines[-5].startswith("■ exploding confirmed (critical), step 95, prime suspect encoder…xxx")
    assert lines[-4].startswith("  gradient norm surges in encoder.blocks.11")
    assert lines[-3] == "  do: Lower the learning rate (now 0.1), or warm it up."
    assert lines[-2] == "auto-clip on  ClipNorm(max_norm=1.0), 5 clipped, 0 skipped"
    assert lines[-1] == "1,234 steps/s · gradwatch itself 62 µs a step (7.7 %)"
    assert drawn(View(snapshot(steps_per_second=float("nan"))), 90, 30)[-1] == "gradwatch itself 62 µs a step"
    assert len(lines) == 23


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 24), (40, 10), (30, 6), (120, 30)])
@pytest.mark.parametrize("layers", [1, 4, 300])
def test_the_view_fits_any_terminal(width: int, height: int, layers: int) -> None:
    """No line is wider, no picture is higher, the verdict is always there."""
    lines = drawn(View(snapshot(layers)), width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    assert "confirmed" in lines[0]


def test_markup_in_names_is_shown_as_it_is() -> None:
    """`[red]` is part of a name, not a colour."""
    assert "[red]weight[/red]" in "".join(drawn(Summary(snapshot()), 400, 50))
    assert "[red]" in "".join(drawn(View(snapshot()), 200, 60))


def test_the_summary_tells_the_story() -> None:
    """Verdict, order of layers, evidence, what auto-clip did, what to do."""
    text = str(Summary(snapshot()))
    for part in (
        "gradwatch confirmed: 100 steps of Transformer",
        "left their band in this order",
        "gradient norm surges in encoder.blocks.11",
        "at step 95: measured 31, above its limit of 10 (GW301)",
        "auto-clip: ClipNorm(max_norm=1.0) clipped 5 of 5 steps; largest norm 412; still on",
        "do: Lower the learning rate",
    ):
        assert part in " ".join(text.split())


def test_one_is_said_in_the_singular_and_of_no_step_that_nothing_is_known() -> None:
    """Where nothing was stepped, no time per step is known."""
    model = torch.nn.Linear(2, 1, bias=False)
    with gradwatch.attach(model, report=None, strict=True) as monitor:
        assert str(monitor.summary()).splitlines() == [
            "gradwatch healthy: 0 steps of Linear (1 layer, 2 parameters)",
            "  no step of an optimizer was seen, so nothing is known",
        ]
        model(torch.ones(2)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    first, *_, last = str(monitor.summary()).splitlines()
    assert first == "gradwatch healthy: 1 step of Linear (1 layer, 2 parameters) with SGD"
    assert last.endswith("µs a step")
    assert "loss from the tensor that backward() began at" in str(monitor.summary())


def test_a_confirming_sign_alone_stands_beside_the_verdict() -> None:
    """Large but stable gradients."""
    text = str(Summary(snapshot(incidents=(), verdict="healthy", firing=("GW203 gradients above 1.0 in each layer",))))
    assert "  GW203 gradients above 1.0 in each layer fires, which opens no incident by itself" in text


@given(st.lists(st.floats(), max_size=300), st.integers(0, 80))
def test_a_sparkline_never_exceeds_its_width(values: list[float], width: int) -> None:
    """Whatever the values, NaN and Inf included."""
    line = sparkline(np.array(values), width)
    assert len(line) == min(width, len(values))
    assert set(line) <= {*BLOCKS, NOT_FINITE}


def test_a_number_fits_its_column() -> None:
    """Eight characters at most, NaN and Inf spelled out."""
    for value in (0.0, 1.0, -1e-12, 123456.0, 9.99999e307, 0.00123, float("nan"), float("inf")):
        assert len(brief(value)) <= 9
    assert shorten("short", 10) == "short"


def test_log_lines_come_only_on_change_and_never_twice() -> None:
    """No line for a quiet step; the advice once."""
    stream = io.StringIO()
    report = LogReport(stream)
    report.step(snapshot(news=()))
    assert stream.getvalue() == ""
    report.step(snapshot())
    first = stream.getvalue()
    report.step(snapshot())
    assert stream.getvalue() == first
    assert first.count("do: Lower the learning rate") == 1
    assert all(line.startswith("gradwatch | step 99 | ") for line in first.splitlines())


def run_piped(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with its output in pipes."""
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        timeout=120,
        check=False,
    )


def test_in_a_pipe_there_are_plain_lines_on_change_only() -> None:
    """The user's own output stays clean on stdout; lines and summary go to stderr without escapes.

    The first ninety steps are healthy and say nothing but their summary.
    """
    script = """
monitor = gradwatch.attach(model)
loop = steps(range(150))
for step in loop:
    if step == 89:
        monitor.detach()
        gradwatch.attach(model)
print('done')
"""
    done = run_piped(EXPLODING + script)
    assert done.returncode == 0
    assert done.stdout == "done\n"
    assert "\x1b" not in done.stderr
    healthy, sick = done.stderr.split("gradwatch | ", 1)
    assert healthy.startswith("gradwatch healthy: 90 steps of Sequential")
    assert sick.startswith("step 10 | exploding")
    assert "60 steps of Sequential" in sick


def test_it_does_not_crash_in_a_notebook(tmp_path: Path) -> None:
    """A real kernel runs a real notebook; log lines and summary appear in its output."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                EXPLODING + "monitor = gradwatch.attach(model)\nfor _ in steps(range(150)): pass\nmonitor.detach()"
            ),
            nbformat.v4.new_code_cell("monitor.summary()"),
        ]
    )
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = json.dumps(book)
    assert "exploding" in text
    assert "150 steps of Sequential" in text
    assert not [output for cell in book.cells for output in cell.outputs if output.output_type == "error"]


class Shown(gradwatch.Report):
    """Counts the steps that it is shown."""

    period = 0.0

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, snapshot: Snapshot) -> None:
        """Keep the step."""
        self.steps.append(snapshot.step)

    def close(self, snapshot: Snapshot) -> None:
        """Nothing follows."""


@pytest.mark.parametrize("where", ["optimizer step", "optimizer in backward", "as on a device"])
def test_reports_go_on_while_auto_clip_acts(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is shown to a report without a period, also where auto-clip cannot act or its decision comes too late."""
    if where == "as on a device":
        monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    torch.manual_seed(0)
    model, shown = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), Shown()
    monitor = gradwatch.attach(model, report=shown, strict=True, clip="norm")
    if where == "optimizer in backward":
        optimizers = {parameter: torch.optim.SGD([parameter], lr=0.01) for parameter in model.parameters()}

        def step(parameter: torch.nn.Parameter) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    whole = torch.optim.SGD(model.parameters(), lr=0.01)
    for count in range(120):
        whole.zero_grad()
        (model(torch.randn(16, 4)).square().mean() * (1.0 if count < 80 else 1e3 * 2 ** (count - 80))).backward()
        if where != "optimizer in backward":
            whole.step()
    monitor.detach()
    assert monitor.incidents
    assert shown.steps == list(range(120))


def test_a_report_of_ones_own_gets_snapshots() -> None:
    """One object, frozen, at each change and at the end."""
    from tests.trainings import mlp, train

    class Collect(gradwatch.Report):
        period = 0.0
        seen: list[Snapshot]
        closed = False

        def __init__(self) -> None:
            self.seen = []

        def step(self, snapshot: Snapshot) -> None:
            self.seen.append(snapshot)

        def close(self, snapshot: Snapshot) -> None:
            self.closed = True

    import torch

    model, report = mlp(), Collect()
    with gradwatch.attach(model, report=report, strict=True):
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), 5)
    assert [one.step for one in report.seen] == [0, 1, 2, 3, 4]
    assert report.closed
