"""The end of a monitor: every part of it is done whatever becomes of the others, and nothing of that reaches the user."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.probe import gradient_hooks, gradients, optimizer_hooks, patches, step_recorder
from gradwatch.reports.desk import ReportDesk
from gradwatch.reports.log import LogReport, write_line
from gradwatch.reports.summary import Summary
from gradwatch.runlog import RunLog
from gradwatch.runlog.recording import Recording
from gradwatch.verdict.alarms import Alarms
from tests.conftest import left_behind

# every function that detach calls, and what stays behind when it does not do its own part
PARTS: list[tuple[Any, str, set[str]]] = [
    (step_recorder.StepRecorder, "catch_up", set()),
    (step_recorder.StepRecorder, "close", set()),
    (gradient_hooks.GradientHooks, "stop", {"hooks on parameters"}),
    (gradients.Gradients, "restore", set()),
    (patches.Patch, "remove", {"patch of torch.autograd.backward", "patch of _group_tensors_by_device_and_dtype"}),
    (optimizer_hooks, "unlisten", {"optimizer hooks"}),
    (Alarms, "closeness", set()),  # without it there is no snapshot
    (LogReport, "close", set()),
    (Summary, "__str__", set()),
    (Recording, "close", {"gradwatch run log"}),
]


class Failing(gradwatch.Report):
    """A report that cannot end."""

    def step(self, snapshot: gradwatch.Snapshot) -> None:
        """See `gradwatch.Report`."""

    def close(self, snapshot: gradwatch.Snapshot) -> None:
        """See `gradwatch.Report`."""
        raise OSError("the report cannot end")


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """Train for some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).pow(2).mean().backward()
        optimizer.step()
    return optimizer


def remains(model: nn.Module) -> set[str]:
    """Name what is left of a monitor, on the model too."""
    hooked = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    return set(left_behind()) | ({"hooks on parameters"} if hooked else set())


def raising(error: BaseException, original: Any = None) -> Any:
    """Return a function that raises, at once or when it has done what another does."""

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        if original is not None:
            original(*args, **kwargs)
        raise error

    return function


@pytest.mark.parametrize("done", [True, False], ids=["afterwards", "at once"])
@pytest.mark.parametrize(("owner", "name", "own"), PARTS, ids=[f"{o.__name__}.{n}" for o, n, _ in PARTS])
def test_a_part_that_fails_leaves_the_others_done(
    owner: Any, name: str, own: set[str], *, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detach returns; nothing stays but what the failing part itself should have removed; it is told once."""
    model, stream = nn.Linear(2, 1), io.StringIO()
    reports = [Failing(), LogReport(stream)]
    monitor = gradwatch.attach(model, report=reports, log=tmp_path)
    optimizer = train(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(RuntimeError("by intention"), getattr(owner, name) if done else None))
        monitor.detach()
        left = remains(model)
    assert left <= (set() if done else own)
    assert not monitor.attached
    assert gradwatch.monitor_of(model) is None
    assert len([note for note in monitor.notes if "the report cannot end" in note]) == 1
    assert any("by intention" in note for note in monitor.notes)
    if "Summary" not in str(owner) and owner is not LogReport:
        stale = "this is the state at step 0" if name == "closeness" else "3 steps of Linear"
        assert stale in stream.getvalue()
    if not done:  # end by hand what was kept from ending
        for one in patches.ALL:
            one.remove(monitor._probe)
        optimizer_hooks.unlisten(monitor._probe)
        monitor._probe.gradient_hooks.stop()
        log = monitor._pipeline.desk.log
        if isinstance(log, Recording):
            log._writer.close(10.0)
    assert remains(model) == set()
    with RunLog(tmp_path) as log_of_run:
        assert log_of_run.series().step.tolist()[:1] == [0]
    optimizer.step()


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, n, _ in PARTS if n not in ("snapshot", "__str__")])
def test_an_interrupt_waits_until_all_is_done(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in any part of detach: the rest is done, then it is raised."""
    model = nn.Linear(2, 1)
    monitor = gradwatch.attach(model, report=LogReport(io.StringIO()), log=tmp_path)
    optimizer = train(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(KeyboardInterrupt(), getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            monitor.detach()
    assert remains(model) == set()
    optimizer.step()


def test_strict_raises_when_all_is_done() -> None:
    """The error of a part, after the others."""
    model = nn.Linear(2, 1)
    monitor = gradwatch.attach(model, report=[Failing(), report := LogReport(stream := io.StringIO())], strict=True)
    train(model)
    with pytest.raises(OSError, match="the report cannot end"):
        monitor.detach()
    assert remains(model) == set()
    assert report is not None
    assert "3 steps of Linear" in stream.getvalue()


@pytest.mark.parametrize("strict", [True, False])
def test_the_trainings_own_error_goes_first(*, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails at the end of a ``with`` never hides it."""
    model = nn.Linear(2, 1)
    monkeypatch.setattr(ReportDesk, "raised", raising(RuntimeError("by intention")))

    def run() -> NoReturn:
        with gradwatch.attach(model, report=Failing(), strict=strict):
            train(model)
            raise ZeroDivisionError("the training's own")

    with pytest.raises(ZeroDivisionError, match="the training's own"):
        run()
    assert remains(model) == set()


def test_a_model_that_goes_ends_its_monitor_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """Also strict, also when a part fails: a finalizer must not raise."""
    monitor = gradwatch.attach(model := nn.Linear(2, 1), report=Failing(), strict=True)
    train(model)
    del model
    assert not monitor.attached
    assert left_behind() == []
    assert "Exception ignored" not in capsys.readouterr().err


def test_the_end_of_the_program_raises_nothing() -> None:
    """A report that fails at exit is told of, and the exit code is 0."""
    script = """
import torch, gradwatch
from tests.test_detach import Failing, train
model = torch.nn.Linear(2, 1)
gradwatch.attach(model, report=Failing())
train(model)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0
    assert done.stderr.count("report Failing failed at the end") == 1
    assert "Exception ignored" not in done.stderr


class Bad:
    """A standard error stream of which one thing fails, whatever is asked of it."""

    def __init__(self, fails: str, error: Exception) -> None:
        self._fails, self._error = fails, error

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        if name == self._fails:
            raise self._error
        if name == "encoding":
            return "utf-8"
        if name == "write":
            return len
        if name == "isatty":
            return lambda: True
        if name in ("flush", "fileno"):
            return lambda: 2
        raise AttributeError(name)


class WriteAlone:
    """A tee as many programs have it."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        """Take text."""
        self.text += text


@pytest.mark.parametrize("report", ["auto", "live", "log"])
@pytest.mark.parametrize("error", [ValueError("I/O operation on closed file"), BrokenPipeError(32, "Broken pipe")])
@pytest.mark.parametrize("fails", ["write", "flush", "isatty", "encoding", "fileno"])
def test_a_standard_error_stream_that_fails_breaks_nothing(
    fails: str, error: Exception, report: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attach, training, detach; a report of the user's own that fails is told of to that stream, which breaks nothing either."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(logging, "raiseExceptions", True)
    model = nn.Linear(2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Bad(fails, error))
        logging.getLogger("gradwatch").propagate = False  # to the handler of last resort, which writes to stderr
        try:
            with gradwatch.attach(model, report=[report, Failing()]) as monitor:
                train(model)
                monitor.note("something to tell")
                train(model)
        finally:
            logging.getLogger("gradwatch").propagate = True
    assert monitor.history.steps(last=1).tolist() == [5]
    assert not [note for note in monitor.notes if "measuring" in note]


@pytest.mark.parametrize("stream", [None, WriteAlone(), io.StringIO()], ids=["None", "tee", "StringIO"])
def test_a_standard_error_stream_of_any_kind_is_written_to(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None as in a program without a console; a tee without ``isatty``, ``encoding`` and ``flush``."""
    model = nn.Linear(2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with gradwatch.attach(model):
            train(model)
    if stream is not None:
        text = stream.text if isinstance(stream, WriteAlone) else stream.getvalue()
        assert "3 steps of Linear" in text


def test_a_pipe_that_nobody_reads_any_more_breaks_nothing(tmp_path: Path) -> None:
    """Standard error is closed by its reader in the middle of the run: the training goes on to its end."""
    script = f"""
import sys, torch, gradwatch
from tests.test_detach import train
model = torch.nn.Linear(2, 1)
monitor = gradwatch.attach(model)
train(model)
monitor.note("first"); train(model)
sys.stdin.readline()
monitor.note("second"); train(model)
monitor.detach()
open({str(tmp_path / "end")!r}, "w").write(str(monitor.attached))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert process.stderr is not None
    assert process.stdin is not None
    assert "first" in process.stderr.readline()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.wait(timeout=60)
    assert (tmp_path / "end").read_text() == "False"


def test_a_stream_that_was_named_tells_that_it_failed() -> None:
    """Nobody else would: what is lost in a file of the user's is said."""
    stream = io.StringIO()
    stream.close()
    with pytest.raises(ValueError, match="closed file"):
        write_line("a line", stream)
