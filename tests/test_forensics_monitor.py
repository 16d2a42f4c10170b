"""The operation that made the first non-finite number, found by a monitor after the fact, with nothing switched on."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.forensics import causes as failing
from benchmarks.forensics.causes import CAUSES, HEALTHY, MODULE, Net
from gradwatch import device
from gradwatch.__main__ import main
from gradwatch.forensics.capture import Capture
from gradwatch.reports.log import LogReport
from gradwatch.runlog import RunLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom")
Loss = "Callable[[Tensor, Tensor], Tensor]"


def square(out: Tensor, _: Tensor) -> Tensor:
    """Return the mean of the squares."""
    return out.pow(2).mean()


def watched(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor] = square,
    x: Tensor | None = None,
    steps: int = 2,
    **settings: Any,
) -> gradwatch.Monitor:
    """Train for some steps and return the monitor, detached."""
    x = torch.randn(failing.ROWS, failing.WIDTH) if x is None else x
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, **({"report": None, "strict": True, "forensics": True} | settings)) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(x), x).backward()
            optimizer.step()
    return monitor


def origin_in(monitor: gradwatch.Monitor) -> gradwatch.Origin | None:
    """Return the origin of the first incident that has one."""
    return next((one.origin for one in monitor.incidents if one.origin is not None), None)


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_in_the_model_is_named_after_the_fact(name: str) -> None:
    """With module, line, direction and rows; the replay gave the same result as the original."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    found = origin_in(watched(Net(cause.run), steps=1))
    assert found is not None
    assert (found.op, found.direction, found.module, found.part) == (cause.op, cause.direction, MODULE, "model")
    assert found.line in cause.lines
    assert (found.rows, found.faithful, found.found_by) == (cause.rows, True, "replay")


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_in_the_loss_code_is_named_with_its_line(name: str) -> None:
    """The loss is computed again from its source; no function of the program is called."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    monitor = watched(nn.Linear(failing.WIDTH, failing.WIDTH), lambda out, _: cause.run(out).pow(2).mean(), steps=1)
    found = origin_in(monitor)
    assert found is not None
    assert (found.op, found.direction, found.module, found.part) == (cause.op, cause.direction, None, "loss code")
    assert found.line in cause.lines
    assert (found.rows, found.found_by) == (cause.rows, "source")


# of these a graph keeps too little: which operation it was is known only if the source of the loss is understood
KEPT_TOO_LITTLE = {
    *("function of its own", "float16 product", "narrowed to float16", "integer overflow", "deviation of an encoder"),
}


def called_elsewhere(loss: Tensor) -> None:
    """Call backward in another function than the model, so that the source of the loss is not looked at."""
    loss.backward()


@pytest.mark.parametrize("name", CAUSES)
def test_without_its_source_a_cause_in_the_loss_code_is_named_by_its_graph_or_not_at_all(name: str) -> None:
    """What is not known is not said."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    model, x = nn.Linear(failing.WIDTH, failing.WIDTH), torch.randn(failing.ROWS, failing.WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        called_elsewhere(cause.run(model(x)).pow(2).mean())
        optimizer.step()
    found = origin_in(monitor)
    if found is None:
        assert name in KEPT_TOO_LITTLE
        told = [line for incident in monitor.incidents for line in incident.evidence]
        assert any(line.startswith("which operation made step") and "is not known" in line for line in told)
    else:
        assert (found.op, found.direction, found.module, found.part) == (cause.op, cause.direction, None, "loss code")
        assert (found.found_by, found.line) == ("graph", 0)
        assert found.rows in ((), cause.rows)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_program_is_not_investigated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of -inf and dropped branches are no reason to look."""
    monkeypatch.setattr("gradwatch.forensics.inspector.Investigation", None)
    torch.manual_seed(0)
    assert watched(Net(HEALTHY[name]), steps=3).incidents == []


class Recurrent(nn.Module):
    """An LSTM with dropout and normalisation, and a state that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(5, 1)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Run, and count."""
        self.calls += 1
        self.seen.append(len(x))
        state = self.drop(self.norm(self.lstm(x)[0][:, -1]))
        result: Tensor = self.head(state + 0.01 * random.random() + 0.01 * float(np.random.rand()))  # noqa: NPY002, S311
        return result


class Plain(nn.Module):
    """Layers without a state in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        result: Tensor = self.body(x)
        return result


def bad_in_forward(out: Tensor) -> Tensor:
    """Return a loss that is not finite."""
    return (out * 0).log().mean()


def bad_in_backward(out: Tensor) -> Tensor:
    """Return a finite loss whose backward is not."""
    return (out * 0).abs().sqrt().mean()


def history_of(make: type[nn.Module], bad: Callable[[Tensor], Tensor], *, at: str, watch: bool) -> Iterator[Any]:
    """Yield everything that a training leaves behind: losses, gradients, weights, buffers, generators, what hooks saw."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    heard: list[str] = []
    model = make()
    model.register_forward_hook(lambda *_: heard.append("forward"))
    next(model.parameters()).register_hook(lambda gradient: heard.append(str(float(gradient.nan_to_num().sum()))))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None, strict=True, forensics=True) if watch else None
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(7, 3, 4)
        if step in (2, 4) and at == "input":
            x[3, 1, 2] = torch.nan
        out = model(x)
        loss = bad(out) if step in (2, 4) and at == "loss" else out.pow(2).mean()
        loss.backward()
        yield loss.detach()
        for parameter in model.parameters():
            assert parameter.grad is not None
            yield parameter.grad.clone()
            parameter.grad.nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0)
        if monitor is not None and step in (2, 4):
            for one in monitor.notes:
                assert "failed" not in one
        optimizer.step()
    yield from model.state_dict().values()
    yield torch.get_rng_state()
    yield torch.tensor([random.random(), np.random.rand()])  # noqa: NPY002, S311
    yield torch.tensor([hash(tuple(heard)) % 2**40, getattr(model, "calls", 0), len(getattr(model, "seen", []))])
    if monitor is not None:
        monitor.detach()


@pytest.mark.parametrize(
    ("at", "bad"), [("loss", bad_in_forward), ("loss", bad_in_backward), ("input", bad_in_forward)]
)
@pytest.mark.parametrize("make", [Recurrent, Plain])
def test_a_training_after_a_replay_is_bit_identical(
    make: type[nn.Module], bad: Callable[[Tensor], Tensor], at: str
) -> None:
    """Losses, gradients, weights, buffers, generators, what the forward keeps in Python, and what users' hooks see."""
    with_it, without = list(history_of(make, bad, at=at, watch=True)), list(history_of(make, bad, at=at, watch=False))
    for number, (one, other) in enumerate(zip(with_it, without, strict=True)):
        assert torch.equal(one.nan_to_num(nan=-77.0), other.nan_to_num(nan=-77.0)), number


def test_each_step_is_bit_identical_when_the_model_is_replayed_with_its_backward() -> None:
    """A backward that fails inside of the model is repeated on stand-ins: nothing reaches the gradients of the training."""

    def train(*, watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net(CAUSES["sqrt at zero"].run, nn.Dropout(0.2), nn.BatchNorm1d(failing.WIDTH))
        optimizer = torch.optim.Adam(model.parameters())
        monitor = gradwatch.attach(model, report=None, strict=True, forensics=True) if watch else None
        for _ in range(4):
            optimizer.zero_grad()
            square(model(torch.randn(failing.ROWS, failing.WIDTH)), model).backward()  # type: ignore[arg-type]
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.nan_to_num_(0.0, 1.0, -1.0)
            optimizer.step()
        if monitor is not None:
            assert monitor._inspector is not None
            monitor.detach()
        return [*model.state_dict().values(), torch.get_rng_state()]

    for one, other in zip(train(watch=True), train(watch=False), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_kept_of_a_step_that_is_over() -> None:
    """Neither inputs nor outputs, gradients or graphs."""
    model = Net(torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gradwatch.attach(model, report=None, forensics=True)
    inspector = monitor._inspector
    assert inspector is not None
    for _ in range(3):
        out = model(torch.randn(failing.ROWS, failing.WIDTH))
        assert len(inspector._capture.calls) == 1
        torch.sqrt(out.pow(2).mean()).backward()
        assert out.grad is not None
        assert len(inspector._singular.kept) == 1
        optimizer.step()
        assert inspector._capture.calls == []
        assert inspector._singular.kept == []
    monitor.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_copy_and_a_pickle_of_a_watched_model_hold_nothing_of_gradwatch() -> None:
    """They run and are read by a program that has no gradwatch."""
    model = Net(torch.tanh)
    with gradwatch.attach(model, report=None, forensics=True) as monitor:
        copied = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        assert b"gradwatch" not in stream.getvalue()
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        for one in (copied, loaded, pickle.loads(pickle.dumps(model))):
            one(torch.randn(4, failing.WIDTH)).sum().backward()
            assert len(monitor._inspector._capture.calls) == 0  # type: ignore[union-attr]


def test_short_steps_are_not_captured_by_default_and_long_ones_are() -> None:
    """A step of a small model takes less than a millisecond."""

    def hooks(width: int) -> int:
        model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        with gradwatch.attach(model, report=None):
            for _ in range(25):
                optimizer.zero_grad()
                model(torch.randn(8 if width < 100 else 64, width)).pow(2).mean().backward()
                optimizer.step()
            return len(model._forward_hooks)

    assert min(hooks(8) for _ in range(5)) == 0  # a machine at work makes some steps longer
    assert hooks(1024) == 1


def test_at_most_three_investigations_are_made_and_each_says_what_it_cost() -> None:
    """A training that stays broken is not repeated again and again."""
    made = []

    class Opaque(torch.autograd.Function):
        """Makes NaN where nobody sees it."""

        @staticmethod
        def forward(_: Any, out: Tensor) -> Tensor:
            """Return NaN."""
            return torch.tensor(float(out.detach().numpy().sum()) * float("nan"))

        @staticmethod
        def backward(_: Any, __: Tensor) -> Any:
            """Return zeros."""
            return torch.zeros(failing.ROWS, 1)

    def count(self: Capture, *, on: bool) -> None:
        made.append(on)
        self.on = on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Capture, "pause", count)
        monitor = watched(Net(torch.tanh), lambda out, _: Opaque.apply(out), steps=6)  # type: ignore[no-untyped-call]
    assert made.count(False) == 3
    assert origin_in(monitor) is None
    told = [line for incident in monitor.incidents for line in incident.evidence]
    assert len([line for line in told if "is not known" in line and line.endswith(" ms")]) == 1


def test_a_failure_of_an_investigation_does_not_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ArithmeticError("by intention")

    monkeypatch.setattr("gradwatch.forensics.inspector.Investigation", fail)
    monitor = watched(Net(CAUSES["log of zero"].run), steps=3, strict=False)
    assert [note for note in monitor.notes if "by intention" in note]
    assert monitor.history.rows == 3


def test_forensics_can_be_left_out_and_refuses_what_it_does_not_know() -> None:
    """With False nothing is kept and nothing is looked for."""
    model = Net(CAUSES["log of zero"].run)
    monitor = watched(model, forensics=False)
    assert origin_in(monitor) is None
    with pytest.raises(
        gradwatch.UsageError, match='forensics=\'always\'; expected "auto", True, False, "lines" or "wait"'
    ):
        gradwatch.attach(model, forensics="always")


def test_a_batch_that_holds_nan_is_named_in_the_first_line_of_the_incident() -> None:
    """Without the user's help."""
    x = torch.randn(failing.ROWS, failing.WIDTH)
    x[5, 1] = torch.nan
    monitor = watched(Net(torch.tanh), x=x)
    assert "batch `x` held 1 NaN (row 5)" in str(monitor.incidents[0])


def test_a_target_that_holds_nan_is_named_as_the_argument_of_the_loss() -> None:
    """Or by the user's own name, if the batch was handed over."""
    y = torch.zeros(failing.ROWS, 1)
    y[9] = torch.nan
    monitor = watched(Net(torch.tanh), lambda out, _: nn.functional.mse_loss(out, y))
    assert re.search(
        r"`mse_loss` at \S+:\d+ in the loss code \(forward\) got 1 NaN in its `target` \(row 9\)",
        str(monitor.incidents[0]),
    )
    model = Net(torch.tanh)
    with gradwatch.attach(model, report=None, forensics=True) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = monitor.batch({"x": torch.randn(failing.ROWS, failing.WIDTH), "labels": y})
        nn.functional.mse_loss(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
    assert "batch `labels` held 1 NaN (row 9)" in str(monitor.incidents[0])


def test_the_finding_stands_in_the_log_lines_the_summary_the_run_log_and_the_advice(tmp_path: Path) -> None:
    """The advice of the operation comes first."""
    stream = io.StringIO()
    model = Net(CAUSES["log of zero"].run)
    monitor = watched(model, report=LogReport(stream), log=tmp_path)
    incident = monitor.incidents[0]
    assert incident.origin is not None
    assert incident.advice[0] == incident.origin.advice[0]
    assert incident.advice[0].startswith("Clamp the argument: torch.log(p.clamp_min(1e-8))")
    for text in (stream.getvalue(), str(monitor.summary())):
        assert "`log` at causes.py:" in text
        assert "rows 5, 11 of the batch" in text
    with RunLog(tmp_path) as log:
        assert log.incidents[0].origin == incident.origin


@pytest.mark.parametrize("mode", ["accumulation", "two forwards"])
def test_of_several_forwards_the_one_that_failed_is_repeated(mode: str) -> None:
    """Its rows are those of its own batch."""
    model = Net(torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [torch.randn(failing.ROWS, failing.WIDTH) for _ in range(3)]
    batches[1][4, 2] = torch.inf
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        if mode == "accumulation":
            for x in batches:
                model(x).pow(2).mean().backward()
        else:
            torch.stack([model(x).pow(2).mean() for x in batches]).sum().backward()
        optimizer.step()
    found = origin_in(monitor)
    assert found is not None
    assert (found.name, found.rows) == ("x", (4,)) or found.op in ("addmm", "tanh")


def test_the_optimizers_arithmetic_is_told_with_rate_eps_and_second_moment() -> None:
    """In float16 an eps of 1e-8 is zero, and a gradient that is always zero divides zero by zero."""
    model = nn.Linear(2, 1).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([[0.0, 1.0]], dtype=torch.float16)).float().sum().backward()
            optimizer.step()
    found = origin_in(monitor)
    assert found is not None
    assert (found.subject, found.name, found.direction) == ("optimizer", "Adam", "update")
    assert "Adam with rate 0.001, eps 1e-8, which is 0 in float16, smallest second moment 0" in str(found)


@pytest.mark.parametrize("name", CAUSES)
def test_with_lines_a_cause_in_the_loss_code_is_named_with_its_line(name: str) -> None:
    """They are run again only if their source is not understood."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    model, x = nn.Linear(failing.WIDTH, failing.WIDTH), torch.randn(failing.ROWS, failing.WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    count = 0
    with gradwatch.attach(model, report=None, strict=True, forensics="lines") as monitor:
        optimizer.zero_grad()
        out = model(x)
        count += 1
        loss = cause.run(out).mean()
        loss = loss / 2
        loss.backward()
        optimizer.step()
    found = origin_in(monitor)
    assert found is not None, monitor.notes
    assert (found.op, found.direction, found.part, found.found_by) == (
        cause.op,
        cause.direction,
        "loss code",
        "source",
    )
    assert found.line in cause.lines
    assert count == 1


def test_a_loss_in_one_statement_and_one_under_autocast_are_run_again() -> None:
    """As programs write them."""
    model, x = nn.Linear(failing.WIDTH, 1), torch.randn(failing.ROWS, failing.WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics="lines") as monitor:
        torch.log(model(x) * 0).mean().backward()
        optimizer.step()
    assert "`log` at test_forensics_monitor.py:" in str(monitor.incidents[0])
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    with gradwatch.attach(model, report=None, strict=True, forensics="lines") as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            loss = torch.sqrt((out.float() * 0).abs()).sum()
        loss.backward()
        optimizer.step()
    assert "`sqrt` at test_forensics_monitor.py:" in str(monitor.incidents[0])


def test_the_batch_of_the_step_that_failed_is_kept_and_its_program_names_the_operation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gradwatch reproduce` prints lines that run once the model and the loss are put in."""
    torch.manual_seed(1)
    model = Net(CAUSES["log of zero"].run)
    watched(model, log=tmp_path, save_batch=True)
    kept = torch.load(tmp_path / "batch-0.pt", weights_only=True)
    assert kept["args"][0].shape == (failing.ROWS, failing.WIDTH)
    assert main(["reproduce", str(tmp_path)]) == 0
    program = capsys.readouterr().out
    assert len(program.splitlines()) == 10
    assert "`log` at causes.py:" in program.splitlines()[0]
    program = program.replace("model = ...", "model = the_model").replace("loss = ...", "loss = out.mean()")
    with pytest.raises(gradwatch.NonFiniteError, match=r"`log` at causes\.py"):
        exec(program, {"the_model": Net(CAUSES["log of zero"].run)})  # noqa: S102  it is what was printed
    assert main(["reproduce", str(tmp_path), "--step", "7"]) == 2
    with pytest.raises(gradwatch.UsageError, match="save_batch=True with log=None"):
        gradwatch.attach(model, save_batch=True)


def test_on_a_device_the_inputs_of_a_step_are_looked_at_when_its_row_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps later, with newer weights; a step is not waited for."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    model = Net(torch.tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        for step in range(40):
            optimizer.zero_grad()
            x = torch.randn(failing.ROWS, failing.WIDTH)
            if step == 20:
                x[5, 1] = torch.nan
            square(model(x), x).backward()
            optimizer.step()
    found = origin_in(monitor)
    assert found is not None
    assert (found.subject, found.name, found.rows, found.step) == ("input", "x", (5,), 20)
    assert monitor._inspector is not None
    assert monitor._inspector._earlier._kept == []


def test_on_a_device_wait_reads_the_loss_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is exact: module and line are those of the step itself."""
    monkeypatch.setattr(device, "reading_is_free", lambda _: False)
    found = origin_in(watched(Net(CAUSES["log of zero"].run), steps=12, forensics="wait"))
    assert found is not None
    assert (found.op, found.module, found.lag) == ("log", MODULE, 0)


def test_what_the_program_computes_between_two_modules_is_no_batch() -> None:
    """There is nothing to look for where rows are loaded."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            hidden = model["first"](torch.randn(32, 8)).relu()
            scale = 1e30 if step == 5 else 1.0
            model["second"](hidden * scale * scale).square().mean().backward()
            optimizer.step()
    found = origin_in(monitor)
    assert found is not None
    assert found.subject != "input"
    assert not any("loaded" in line for line in found.advice)
