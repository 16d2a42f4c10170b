"""Programs whose first non-finite number is easily attributed to the wrong place: what is said of each is right."""

from __future__ import annotations

import linecache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, WIDTH = 16, 6
TARGETS = np.full((ROWS, WIDTH), 0.5, dtype=np.float32)
TARGETS[3, 1] = np.nan
FIRST = torch.arange(WIDTH) == 0


class Program(NamedTuple):
    """A training of one step.

    Attributes:
        forward: what the model does with its layer and the input.
        loss: the loss of what it returns, given the layer too.
        origin: subject, operation, direction, module, part and name that should be said; None for no finding.
        text: part of the line that should be named; empty if none is.
        x: input; None for random numbers.
        autocast: dtype in which it runs; None for the usual one.
    """

    forward: Callable[[Any, Tensor], Any]
    loss: Callable[[Any, Any], Tensor]
    origin: tuple[str, str, str, str | None, str, str] | None
    text: str = ""
    x: Tensor | None = None
    autocast: torch.dtype | None = None


class Model(nn.Module):
    """A layer, and what a program does with it."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        """Run."""
        return self.run(self.layer, x)


class Logarithm(torch.autograd.Function):
    """A function whose forward fails."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        """Return the logarithm."""
        ctx.save_for_backward(h)
        return h.clamp_min(0).log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the gradient."""
        (h,) = ctx.saved_tensors
        return gradient / h.clamp_min(1e-3)


class Sign(torch.autograd.Function):
    """A function whose backward overflows."""

    @staticmethod
    def forward(_: Any, h: Tensor) -> Tensor:
        """Return the sign."""
        return h.sign()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Return a gradient that is too large."""
        return gradient * 1e38 * 1e38


def apply(function: Any, h: Tensor) -> Any:
    """Apply a function of autograd."""
    return function.apply(h)


def with_infinity(value: float) -> Tensor:
    """Return an input with an infinity in row 5."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    x[5, 2] = value
    return x


def plain(layer: Any, x: Tensor) -> Any:
    """Return what the layer gives."""
    return layer(x)


def square(out: Tensor, _: Any) -> Any:
    """Return the mean of the squares."""
    return out.pow(2).mean()


def constant(layer: Any, x: Tensor) -> Any:
    """Write NaN into one element."""
    out = layer(x).clone()
    out[2, 1] = torch.nan
    return out


def in_place(layer: Any, x: Tensor) -> Any:
    """Change activations in place, at last with a root whose backward fails."""
    out = layer(x) * (x > 0)
    out.abs_()
    out.sqrt_()
    return out


def divided(layer: Any, x: Tensor) -> Any:
    """Divide in place."""
    out = layer(x).clone()
    out.div_(torch.arange(ROWS)[:, None])
    return out


def scaled(layer: Any, x: Tensor) -> Any:
    """Scale the input, which is infinite still, and subtract its mean, which is NaN."""
    h = 2 * x
    return layer(h - h.mean(0))


def dropped(layer: Any, x: Tensor) -> Any:
    """Drop the elements at which the root is singular, after it was taken."""
    y = layer(x) * (x > 0)
    root = torch.sqrt(y.abs())
    return torch.where(y != 0, root, torch.zeros_like(root))


def masked(layer: Any, x: Tensor) -> Any:
    """Return logits of which some are masked."""
    return layer(x).masked_fill(FIRST, -torch.inf)


def attention(layer: Any, x: Tensor) -> Any:
    """Attend from each row to all others, of which row 5 sees none."""
    h = layer(x)
    seen = torch.ones(ROWS, ROWS, dtype=torch.bool)
    seen[5] = False
    scores = (h @ h.T).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ h


def checkpointed(layer: Any, x: Tensor, *, reentrant: bool) -> Tensor:
    """Run the layer and what follows under a checkpoint, with dropout."""

    def block(x: Tensor) -> Tensor:
        h = F.dropout(layer(x), 0.5)
        return torch.sqrt(h * h)

    result: Tensor = checkpoint(block, x, use_reentrant=reentrant)
    return result


def entropy(logits: Tensor, _: Any) -> Any:
    """Return the mean entropy, where 0 times -inf is NaN."""
    logs = logits.log_softmax(-1)
    return (logs.exp() * logs).sum(-1).mean()


def labelled(logits: Tensor, _: Any) -> Any:
    """Return the loss of labels of which some are masked."""
    return F.cross_entropy(logits, torch.arange(ROWS) % WIDTH)


def of_targets(out: Tensor, _: Any) -> Any:
    """Return the loss of targets of which one is NaN."""
    wanted = torch.from_numpy(TARGETS)
    return F.mse_loss(out, wanted)


def in_parts(layer: Any, x: Tensor) -> dict[str, Any]:
    """Return a dict with a list, and something that the loss does not use."""
    h = layer(x)
    return {"parts": [h.relu(), h.tanh()], "unused": (h * 0).log(), "count": 3}


def similar(out: Tensor, _: Any) -> Any:
    """Return a loss of similarities, which overflow in float16."""
    z = out * 1e4
    products = z @ z.T
    return F.cross_entropy(products.float(), torch.arange(ROWS))


def kept_aside(layer: Any, x: Tensor) -> Any:
    """Keep a part of the loss on a module, as a mixture of experts does."""
    h = layer(x)
    layer.aside = h.relu().log().mean()
    return h


def with_aside(out: Tensor, layer: Any) -> Any:
    """Add the part that the model has kept."""
    part: Tensor = layer.aside
    return out.pow(2).mean() + 0.1 * part


MODEL: tuple[str, str] = ("", "model")
CODE: tuple[None, str] = (None, "loss code")
PROGRAMS = {
    "a function whose forward fails": Program(
        lambda layer, x: apply(Logarithm, layer(x)), square, ("operation", "log", "forward", *MODEL, ""), ".log()"
    ),
    "a function whose backward overflows": Program(
        lambda layer, x: apply(Sign, layer(x)), square, ("operation", "mul", "backward", *MODEL, ""), "1e38"
    ),
    "a constant NaN": Program(constant, square, ("argument", "copy", "forward", *MODEL, "src"), "torch.nan"),
    "a root in place": Program(in_place, square, ("operation", "sqrt", "backward", *MODEL, ""), "sqrt_()"),
    "a division in place": Program(divided, square, ("operation", "div", "forward", *MODEL, ""), "div_("),
    "a root that is dropped": Program(dropped, square, ("operation", "sqrt", "backward", *MODEL, ""), "torch.sqrt("),
    "attention to nothing": Program(attention, square, ("operation", "softmax", "forward", *MODEL, ""), "softmax"),
    "a checkpoint with dropout": Program(
        lambda layer, x: checkpointed(layer, x, reentrant=False),
        square,
        ("operation", "sqrt", "backward", *MODEL, ""),
        "torch.sqrt(",
    ),
    "entropy of masked logits": Program(masked, entropy, ("operation", "mul", "forward", *CODE, ""), "logs.exp()"),
    "a label that is masked": Program(masked, labelled, ("written", "masked_fill", "forward", *MODEL, ""), "masked_fill"),
    "an input that holds infinity": Program(
        plain, square, ("input", "addmm", "forward", "layer", "model", "x"), "layer(x)", with_infinity(torch.inf)
    ),
    "an input that holds minus infinity": Program(
        plain, square, ("input", "addmm", "forward", "layer", "model", "x"), "layer(x)", with_infinity(-torch.inf)
    ),
    "an infinity that is scaled before it is subtracted": Program(
        scaled, square, ("input", "mul", "forward", *MODEL, "x"), "2 * x", with_infinity(torch.inf)
    ),
    "a target of numpy": Program(plain, of_targets, ("argument", "mse_loss", "forward", *CODE, "target"), "mse_loss"),
    "one of several outputs": Program(
        in_parts,
        lambda out, _: out["parts"][0].log().mean() + out["parts"][1].mean(),
        ("operation", "log", "forward", *CODE, ""),
        ".log()",
    ),
    "an output that is not used": Program(in_parts, lambda out, _: out["parts"][1].mean(), None),
    "similarities in float16": Program(
        plain, similar, ("operation", "mm", "forward", *CODE, ""), "z @ z.T", autocast=torch.float16
    ),
    "masked logits": Program(masked, lambda out, _: F.cross_entropy(out, 1 + torch.arange(ROWS) % (WIDTH - 1)), None),
}  # fmt: skip


def train(program: Program, model: Model) -> None:
    """Train for a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(ROWS, WIDTH) if program.x is None else program.x
    with torch.autocast("cpu", program.autocast, enabled=program.autocast is not None):
        out = model(x)
        loss = program.loss(out, model.layer)
    loss.backward()
    optimizer.step()


def after_the_fact(program: Program) -> gradwatch.Origin | None:
    """Return what a monitor has found."""
    model = Model(program.forward)
    with gradwatch.attach(model, report=None, strict=True, forensics=True) as monitor:
        train(program, model)
    return next((one.origin for one in monitor.incidents if one.origin is not None), None)


def while_watched(program: Program) -> gradwatch.Origin | None:
    """Return what `gradwatch.find_nonfinite` has found."""
    model = Model(program.forward)
    try:
        with gradwatch.find_nonfinite(model):
            train(program, model)
    except gradwatch.NonFiniteError as error:
        return error.origin
    return None


@pytest.mark.parametrize("find", [after_the_fact, while_watched])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_origin_is_named_or_nothing_is_said(name: str, find: Callable[[Program], gradwatch.Origin | None]) -> None:
    """With subject, operation, direction, module, part, name and line."""
    program = PROGRAMS[name]
    torch.manual_seed(0)
    found = find(program)
    if program.origin is None or found is None:
        assert (found, program.origin) == (None, None)
        return
    said = (found.subject, found.op, found.direction, found.module, found.part, found.name)
    assert said == program.origin
    assert program.text in linecache.getline(found.file, found.line)
    if found.subject == "input":
        assert str(found).startswith(f"batch `x` held 1 infinity (row 5); `{found.op}`")


@pytest.mark.parametrize(("find", "part"), [(after_the_fact, "model"), (while_watched, "unknown")])
def test_of_a_reentrant_checkpoint_the_line_is_known_and_no_module_is_said(find: Any, part: str) -> None:
    """Its backward runs the forward again, outside of the modules around it."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    found = find(Program(lambda layer, x: checkpointed(layer, x, reentrant=True), square, None, x=x))
    assert (found.op, found.direction, found.module, found.part) == ("sqrt", "backward", None, part)
    assert "torch.sqrt(" in linecache.getline(found.file, found.line)
    assert "outside of the model" not in str(found)


def test_a_loss_that_the_model_has_kept_aside_is_said_to_be_of_the_model() -> None:
    """Its graph says so, by the numbers of its nodes, though no output of the model leads to it."""
    torch.manual_seed(0)
    found = after_the_fact(Program(kept_aside, with_aside, None))
    assert found is not None
    assert (found.op, found.part, found.found_by, found.line) == ("log", "model", "graph", 0)
    assert str(found).startswith("`log` in the model (forward) got ")


def test_what_another_model_has_made_is_said_to_be_outside_of_the_model() -> None:
    """It is neither in the model nor, for certain, in the code of the loss."""
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def loss(out: Tensor, _: Any) -> Any:
        return (out.sigmoid() * other(torch.randn(ROWS, WIDTH)).log()).mean()

    torch.manual_seed(0)
    found = after_the_fact(Program(plain, loss, None))
    assert found is not None
    assert (found.op, found.part, found.found_by) == ("log", "loss code", "graph")
    assert str(found).startswith("`log` outside of the model (forward) got ")
