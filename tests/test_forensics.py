"""The operation that made the first non-finite number: found where every operation is watched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.forensics import causes as failing
from benchmarks.forensics.causes import CAUSES, HEALTHY, MODULE, Block, Net
from gradwatch.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom")


def found_in(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> gradwatch.Origin | None:
    """Return what `find_nonfinite` finds in one step; None if it finds nothing."""
    found = None
    try:
        with gradwatch.find_nonfinite(model):
            loss(model(x)).backward()
    except gradwatch.NonFiniteError as error:
        found = error
    assert found is None or found.origin is not None, str(found)
    return found.origin if found is not None else None


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_in_the_model_is_named_with_module_line_direction_and_rows(name: str) -> None:
    """Each of them is, and nothing else is said."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    found = found_in(Net(cause.run), lambda out: out.pow(2).mean(), torch.randn(failing.ROWS, failing.WIDTH))
    assert found is not None
    assert (found.op, found.direction, found.module, found.part) == (cause.op, cause.direction, MODULE, "model")
    assert Path(found.file) == Path(failing.__file__)
    assert found.line in cause.lines
    assert found.rows == cause.rows
    assert found.advice


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_in_the_loss_code_is_named_with_its_line(name: str) -> None:
    """It stands in no module."""
    cause = CAUSES[name]
    torch.manual_seed(0)
    model = nn.Linear(5, failing.WIDTH)
    found = found_in(model, lambda out: cause.run(out).pow(2).mean(), torch.randn(failing.ROWS, 5))
    assert found is not None
    assert (found.op, found.direction, found.module, found.part) == (cause.op, cause.direction, None, "loss code")
    assert found.line in cause.lines


@pytest.mark.parametrize("name", HEALTHY)
def test_infinities_on_purpose_and_dropped_branches_are_no_finding(name: str) -> None:
    """Neither in the model nor in the loss code."""
    torch.manual_seed(0)
    x = torch.randn(failing.ROWS, failing.WIDTH)
    assert found_in(Net(HEALTHY[name]), lambda out: out.pow(2).mean(), x) is None
    assert found_in(nn.Linear(6, 6), lambda out: HEALTHY[name](out).pow(2).mean(), x) is None


def test_of_two_causes_one_that_where_drops_is_not_named() -> None:
    """Where it chooses element by element, only one of them can count."""
    torch.manual_seed(0)

    def run(h: Tensor) -> Tensor:
        return torch.where(~failing.SOME[:, None], torch.exp(h * 0 + 1e4), torch.log(h * failing.SOME[:, None] + 1))

    found = found_in(Net(run), lambda out: out.mean(), torch.randn(failing.ROWS, failing.WIDTH))
    assert found is not None
    assert found.op == "exp"


def test_of_two_causes_that_meet_in_one_tensor_none_is_named() -> None:
    """Both are listed: which of them counts is not known."""
    model = Net(lambda h: torch.cat([torch.exp(h * 0 + 1e4), torch.log(h * 0)], 1)[:, ::2])
    with (
        pytest.raises(gradwatch.NonFiniteError, match="which counts is not known") as raised,
        gradwatch.find_nonfinite(model),
    ):
        model(torch.randn(failing.ROWS, failing.WIDTH)).mean().backward()
    assert raised.value.origin is None
    assert "`exp`" in str(raised.value)
    assert "`log`" in str(raised.value)


def test_a_batch_that_holds_nan_is_named_by_the_argument_and_its_rows() -> None:
    """With the module that met it first."""
    x = torch.randn(failing.ROWS, failing.WIDTH)
    x[[3, 7], 2] = torch.nan
    found = found_in(Net(torch.tanh), lambda out: out.mean(), x)
    assert found is not None
    assert (found.subject, found.name, found.rows, found.module) == ("input", "x", (3, 7), "blocks.0.linear")
    assert str(found).startswith("batch `x` held 2 NaN (rows 3, 7)")


@pytest.mark.parametrize("subject", ["weight", "buffer"])
def test_a_weight_or_a_buffer_that_is_damaged_is_named(subject: str) -> None:
    """It was damaged before the step."""
    model = Net(torch.tanh, nn.BatchNorm1d(failing.WIDTH)).eval()
    with torch.no_grad():
        state = model.state_dict()
        state["blocks.1.linear.weight" if subject == "weight" else "blocks.2.running_var"][0] = torch.nan
    found = found_in(model, lambda out: out.mean(), torch.randn(failing.ROWS, failing.WIDTH))
    assert found is not None
    assert found.subject == subject
    assert found.name == ("blocks.1.linear.weight" if subject == "weight" else "blocks.2.running_var")


def test_a_line_further_out_is_marked_as_the_call_of_the_model() -> None:
    """A model of torch's own modules has no line of the user's inside."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Softmax(1))
    with torch.no_grad():
        next(model.parameters()).fill_(3e38)
    found = found_in(model, lambda out: out.mean(), torch.full((failing.ROWS, 6), 1e3))
    assert found is not None
    assert (found.op, found.module, found.calls_model) == ("addmm", "0", True)
    assert "below the call at test_forensics.py" in str(found)


def test_the_optimizers_arithmetic_is_named() -> None:
    """With eps of zero and a gradient of zero, Adam divides zero by zero."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0)

    def step() -> None:
        with gradwatch.find_nonfinite(model):
            model(torch.tensor([[0.0, 1.0]])).sum().backward()
            optimizer.step()

    with pytest.raises(gradwatch.NonFiniteError) as raised:
        step()
    assert raised.value.origin is not None
    assert (raised.value.origin.op, raised.value.origin.direction) == ("addcdiv", "update")


def test_find_nonfinite_leaves_the_model_and_the_training_as_they_were() -> None:
    """Losses and weights are those of a run without it, and no hook stays."""

    def train(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(failing.ROWS, 6)
            if watched:
                with gradwatch.find_nonfinite(model):
                    model(x).pow(2).mean().backward()
            else:
                model(x).pow(2).mean().backward()
            optimizer.step()
        assert not model._forward_pre_hooks
        return list(model.state_dict().values())

    for one, other in zip(train(watched=True), train(watched=False), strict=True):
        assert torch.equal(one, other)


def test_find_nonfinite_refuses_what_is_no_module() -> None:
    """With what it got and what it expected."""
    with (
        pytest.raises(gradwatch.UsageError, match=r"got 3; expected a torch\.nn\.Module"),
        gradwatch.find_nonfinite(3),  # type: ignore[arg-type]
    ):
        pass


SCRIPT = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, scale=None):
        return self.head(torch.log(self.body(x).relu() * scale))

torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=float(sys.argv[1]))
for step in range(3):
    optimizer.zero_grad()
    x = torch.randn(7, 4)
    out = net(x, scale=torch.ones(7, 1)) if step == 2 else net.body(x)
    out.pow(2).mean().backward()
    optimizer.step()
"""


def test_blame_runs_a_script_and_names_the_operation(tmp_path: Path) -> None:
    """It passes on the arguments; the exit code says that there is a finding."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "blame", str(script), "0.01"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )
    told = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "`log` at train.py:13 in the model (forward) got" in told
    assert "zeros of 56 and returned" in told
    assert "2 optimizer steps" in told


def test_blame_says_that_a_script_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the number of its steps; the exit code is 0."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("step == 2", "False"))
    assert main(["blame", str(script), "0.01"]) == 0
    assert "every loss, gradient and weight was finite 3 optimizer steps" in " ".join(capsys.readouterr().out.split())
    assert main(["blame", str(tmp_path / "missing.py")]) == 2


def test_a_block_knows_its_path() -> None:
    """The programs of these tests fail where they say."""
    net = Net(torch.tanh)
    assert isinstance(net.get_submodule(MODULE), Block)
