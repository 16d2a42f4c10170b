"""A model whose parts are called instead of itself, such as by `training_step` of Lightning: its operations are named too."""

from __future__ import annotations

import linecache
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS, WIDTH = 16, 6


class Root(nn.Module):
    """Takes the root of positive numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return (x * (x > 0)).sqrt()


class Logarithm(nn.Module):
    """Takes the logarithm of positive numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return (x * (x > 0)).log()


class Codes(nn.Module):
    """A model of two parts, which it calls in its loss; nobody calls the model."""

    def __init__(self, first: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), first or nn.Tanh())
        self.decoders = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), last or nn.Tanh())])

    def loss(self, x: Tensor) -> Tensor:
        """Return the loss of a batch."""
        code = self.encoder(x)
        (decoder,) = self.decoders
        distance: Tensor = (decoder(code) - x).pow(2).mean() + 0.1 * code.pow(2).mean()
        return distance


class Module(Codes):
    """One that a trainer calls by the name that Lightning gives it."""

    def training_step(self, batch: Tensor) -> Tensor:
        """Return the loss."""
        loss = self.loss(batch)
        self.logged = float(loss.detach())
        return loss


class Penalised(Module):
    """Has its fault in the code of its loss."""

    def training_step(self, batch: Tensor) -> Tensor:
        """Return the loss."""
        code = self.encoder(batch)
        result: Tensor = (code * (code > 0)).sqrt().mean() + self.decoders[0](code).mean()
        return result


def found_in(model: Codes, step: Callable[[Any], Tensor], steps: int = 1) -> gradwatch.Origin | None:
    """Return what a monitor finds in the last of some steps, of which the others are healthy."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(ROWS, WIDTH)

    def closure() -> Tensor:
        loss = step(x)
        (loss / 2).backward()
        return loss

    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        for number in range(steps):
            model.encoder[0].requires_grad_(requires_grad=True)
            if number < steps - 1:
                sum(one.pow(2).sum() for one in (model.encoder(x), model.decoders[0](x))).sigmoid().backward()
                optimizer.zero_grad()
                optimizer.step()
            else:
                closure()
                optimizer.step()
        pickle.dumps(model)
        origin = next((one.origin for one in monitor.incidents if one.origin is not None), None)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    return origin


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("kind", "op", "direction"), [(Root, "sqrt", "backward"), (Logarithm, "log", "forward")])
def test_an_operation_in_a_part_that_training_step_calls_is_named(
    kind: type[nn.Module], op: str, direction: str, *, last: bool
) -> None:
    """In the first step, with its path in the model."""
    model = Module(last=kind()) if last else Module(first=kind())
    found = found_in(model, model.training_step)
    assert found is not None
    assert (found.op, found.direction, found.found_by) == (op, direction, "replay")
    assert found.module == ("decoders.0.1" if last else "encoder.2")
    assert f".{op}()" in linecache.getline(found.file, found.line)


def test_the_line_of_a_loss_around_the_parts_is_named() -> None:
    """By its source, with what the parts returned."""
    model = Penalised()
    found = found_in(model, model.training_step)
    assert found is not None
    assert (found.op, found.direction, found.found_by, found.part) == ("sqrt", "backward", "source", "loss code")
    assert ".sqrt()" in linecache.getline(found.file, found.line)


def test_parts_of_any_model_that_is_not_called_are_captured_after_its_first_backward() -> None:
    """In a step before that, only the graph of the loss is known."""
    model = Codes(last=Logarithm())
    found = found_in(model, model.loss, steps=1)
    assert found is not None
    assert (found.op, found.found_by, found.line) == ("log", "graph", 0)
    model = Codes(last=Logarithm())
    found = found_in(model, model.loss, steps=3)
    assert found is not None
    assert (found.op, found.module, found.found_by) == ("log", "decoders.0.1", "replay")
    assert ".log()" in linecache.getline(found.file, found.line)


def test_the_program_of_a_kept_batch_calls_the_part_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the inputs of that part."""
    torch.manual_seed(0)
    model = Module(last=Logarithm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, report=None, strict=True, forensics=True, log=tmp_path, save_batch=True):
        model.training_step(torch.randn(ROWS, WIDTH)).backward()
        optimizer.step()
    assert main(["reproduce", str(tmp_path)]) == 0
    program = capsys.readouterr().out
    assert "model.get_submodule('decoders.0')(*kept" in program
    program = program.replace("model = ...", "model = the_model").replace("loss = ...", "loss = out.mean()")
    with pytest.raises(gradwatch.NonFiniteError, match=r"`log` at test_parts_of_models\.py"):
        exec(program, {"the_model": Module(last=Logarithm())})  # noqa: S102  it is what was printed
