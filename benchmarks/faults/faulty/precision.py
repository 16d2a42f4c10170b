"""Faults of half precision: updates lost to rounding, squares and scores that overflow, loss scales without an end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.faults.data import digit_images, digits, standard, teacher
from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import mlp
from benchmarks.faults.program import Program

if TYPE_CHECKING:
    from benchmarks.faults.program import Run


class Factors(nn.Module):
    """Ratings as products of people's and things' factors, which start between 1 and 2, and a bias of each."""

    def __init__(self, people: int, things: int, width: int = 16) -> None:
        super().__init__()
        self.people, self.things = nn.Embedding(people, width), nn.Embedding(things, width)
        self.person, self.thing = nn.Embedding(people, 1), nn.Embedding(things, 1)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 1.0, 1.9)

    def forward(self, x: Tensor) -> Tensor:
        """Ratings (rows,) in float32; x is (rows, 2)."""
        who, what = x.unbind(1)
        match = (self.people(who) * self.things(what)).mean(1)
        return (match + self.person(who)[:, 0] + self.thing(what)[:, 0]).float()  # type: ignore[no-any-return]


def rounded(run: Run, *, dtype: torch.dtype) -> None:
    """Adam at a small rate on factors of ratings, whose parameters are of a precision."""
    people, things = torch.rand(20, 3), torch.rand(30, 3)
    x = torch.cartesian_prod(torch.arange(20), torch.arange(30))
    y = 5 + standard((people @ things.T).flatten())
    model = Factors(20, 30).to(dtype)
    fit(run, model, torch.optim.Adam(model.parameters(), 0.003), batch_loss(model, (x, y), size=128))


def epsilon(run: Run, *, dtype: torch.dtype) -> None:
    """AdamW with its usual epsilon on a network for digits of a precision; some pixels are always empty."""
    model = mlp(64, 32, 32, 10).to(dtype)
    x, y = digits()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    fit(
        run,
        model,
        optimizer,
        batch_loss(
            model,
            (x.to(dtype), y),
            lambda logits, wanted: nn.functional.cross_entropy(logits.float(), wanted),
        ),
    )


class Rows(nn.Module):
    """Attention between the eight rows of a digit, its scores in float16, their factor before or after the product."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.query, self.key, self.value = nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(8, 32)
        self.head = mlp(8 * 32, 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; x is (rows, 8, 8)."""
        factor = 1 / 512
        query = (self.query(x) * (factor if self.first else 1)).half()
        scores = query @ self.key(x).half().transpose(1, 2) * (1 if self.first else factor)
        return self.head((scores.float().softmax(2) @ self.value(x)).flatten(1) / 32)  # type: ignore[no-any-return]


def scores(run: Run, *, first: bool) -> None:
    """SGD with momentum on attention between the rows of digits whose pixels are 0 .. 128."""
    model = Rows(first=first)
    x, y = digit_images()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    fit(run, model, optimizer, batch_loss(model, (128 * x[:, 0], y), nn.functional.cross_entropy))


class Softplus(nn.Module):
    """Softplus in float16: torch's, or one whose unused branch overflows and has no number for a gradient."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        """As x, in float32."""
        half = x.half()
        if self.own:
            return torch.where(half > 10, half, torch.log(1 + torch.exp(half))).float()
        return nn.functional.softplus(half).float()


def scaler(run: Run, *, own: bool) -> None:
    """RMSprop under a gradient scaler on a softplus network, one of whose features is large."""
    x, y = teacher(inputs=6)
    model = mlp(6, 32, 32, 1, act=partial(Softplus, own=own))
    x = x * torch.tensor([30.0, 1, 1, 1, 1, 1])
    optimizer, scale = torch.optim.RMSprop(model.parameters(), 0.001, alpha=0.9), torch.amp.GradScaler("cpu")
    run.watch(model)
    while True:
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[rows]), y[rows])
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        run.step(loss)


class RootMean(nn.Module):
    """Division by the root of the mean square, computed in a precision."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """As x, in float32."""
        x = x.to(self.dtype)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).float() * self.scale


def squares(run: Run, *, dtype: torch.dtype) -> None:
    """Adagrad on a network that normalises what it makes of features in the thousands, two targets."""
    x, y = teacher(outputs=2)
    model = nn.Sequential(
        nn.Linear(8, 32, bias=False),
        RootMean(32, dtype),
        nn.Tanh(),
        nn.Linear(32, 32),
        RootMean(32, dtype),
        nn.Tanh(),
        nn.Linear(32, 2),
    )
    fit(run, model, torch.optim.Adagrad(model.parameters(), 0.05), batch_loss(model, (5000 * x, y)))


def static(run: Run, *, scale: float) -> None:
    """SGD with Nesterov momentum, the hidden layers computed in float16, a fixed loss scale taken off again."""
    x, y = teacher(inputs=10)
    body, head = mlp(10, 32, 32, 32), nn.Linear(32, 1)
    model = nn.ModuleDict({"body": body, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
    run.watch(model)
    while True:
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            guess = head(body(x[rows]))
        loss = nn.functional.mse_loss(guess.float(), y[rows])
        (loss * scale).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale
        optimizer.step()
        run.step(loss)


PROGRAMS: tuple[Program, ...] = (
    Program(
        "bfloat16 parameters lose their updates",
        "precision",
        partial(rounded, dtype=torch.bfloat16),
        partial(rounded, dtype=torch.float32),
        "Steps of 0.003 are less than half of bfloat16's last digit between 1 and 2 and round away; float32 keeps them.",
        symptoms=("frozen", "stalled"),
        steps=400,
    ),
    Program(
        "AdamW in float16 loses its epsilon",
        "precision",
        partial(epsilon, dtype=torch.float16),
        partial(epsilon, dtype=torch.float32),
        "Epsilon 1e-8 is zero in float16, so a weight without gradient is divided 0 by 0; float32 repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "attention scores overflow float16",
        "precision",
        partial(scores, first=False),
        partial(scores, first=True),
        "The product of queries and keys exceeds float16 before it is scaled down; scaling the queries first repairs it.",
        symptoms=("nonfinite",),
    ),
    Program(
        "loss scale that never recovers",
        "precision",
        partial(scaler, own=True),
        partial(scaler, own=False),
        "The branch that where drops has a gradient of 0 times infinity, so every step is skipped; torch's softplus repairs it.",
        symptoms=("nonfinite", "frozen", "stalled"),
    ),
    Program(
        "mean square overflows float16",
        "precision",
        partial(squares, dtype=torch.float16),
        partial(squares, dtype=torch.float32),
        "Squares beyond 65504 are infinite in float16, so all features become zero; computing them in float32 repairs it.",
        symptoms=("vanishing", "dead", "frozen", "stalled"),
        suspect="1",
    ),
    Program(
        "fixed loss scale too large for float16",
        "precision",
        partial(static, scale=2.0**18),
        partial(static, scale=2.0**10),
        "A fixed loss scale of 2 ** 18 lets gradients overflow in float16, and nothing skips the step; 2 ** 10 fits.",
        symptoms=("nonfinite",),
    ),
)
