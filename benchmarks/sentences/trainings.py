"""The trainings whose sentences the page shows: programs of the fault set, and small ones for what none of these does."""

from __future__ import annotations

from itertools import count
from math import nan
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.faults.loops import batch_loss, fit
from benchmarks.faults.models import Gates, mlp
from benchmarks.faults.programs import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.faults.program import Run

    Train = Callable[[Run], None]


class Training(NamedTuple):
    """A training, its number of steps, and whether auto-clip by norm is on."""

    train: Train
    steps: int
    clip: bool = False


# what fires together: each rule and each kind of incident at least twice
_FAULTY = (
    "one layer's gradient times a thousand",
    "one layer's first moment times ten thousand",
    "attention scores overflow float16",
    "tanh RNN forgets over 100 steps",
    "eight sigmoid layers",
    "warm-up that never ends",
    "loss summed at the rate of a mean",
    "one layer's units silenced at step 150",
    "zero_grad forgotten",
    "values learned from themselves",
    "embedding begins large",
    "labels shuffled apart from images",
    "bfloat16 parameters lose their updates",
    "schedule counted in epochs",
    "division by a deviation of zero",
    "square root at zero in a distance",
    "loss of the wrong sign",
    "first convolution dead by its bias",
    "discriminator's rate too high",
    "LSTM with a huge rate",
    "weight decay of 10",
)
_CLIPPED = (
    "zero_grad forgotten",
    "division by a deviation of zero",
    "one layer's gradient times a thousand",
    "LSTM with a huge rate",
)
_HEALTHY = ("healthy: an aim added midway", "healthy: heavy-tailed noise, Huber", "healthy: REINFORCE in a corridor")


def _sine(run: Run) -> tuple[nn.Sequential, Callable[[], Tensor]]:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(run.seed))
    model = mlp(16, 32, 32, 1)
    return model, batch_loss(model, (x, torch.sin(x[:, :1])))


def _own_clip(bound: float) -> Train:
    def train(run: Run) -> None:
        model, objective = _sine(run)
        fit(run, model, torch.optim.SGD(model.parameters(), lr=0.05), objective, clip=bound)

    return train


def _units_silenced(run: Run) -> None:
    model, objective = _sine(run)
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 1)[:24] = -100.0
    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.05), objective)


def _adam_rate(run: Run) -> None:
    model, objective = _sine(run)
    fit(run, model, torch.optim.Adam(model.parameters(), lr=3.0), objective)


def _stale_optimizer(run: Run) -> None:
    model, objective = _sine(run)
    fit(run, model, torch.optim.SGD(list(model.parameters())[:2], lr=0.05), objective)


def _loss_unseen(run: Run) -> None:
    model, objective = _sine(run)

    def vector() -> Tensor:
        return objective().repeat(2)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.watch(model)
    while True:
        optimizer.zero_grad()
        losses = vector()
        losses.backward(torch.full((2,), 0.5))
        optimizer.step()
        run.step(losses[0])


def _line_search(run: Run) -> None:
    model, objective = _sine(run)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, line_search_fn="strong_wolfe")
    run.watch(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    while True:
        run.step(optimizer.step(closure))


def _batch_left_out(run: Run) -> None:
    """A batch of NaN that the program leaves out itself, after the running statistics have met it."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(run.seed))
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.watch(model)
    for batch in count():
        loss = nn.functional.mse_loss(model(x * (nan if batch == 50 else 1)), x[:, :1])
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss)


def _faded(run: Run) -> None:
    """Weights that the program shrinks bit by bit once they have learned, at a rate that has fallen to nothing."""
    model, objective = _sine(run)

    def fade(step: int) -> None:
        if 200 <= step < 500:
            for parameter in model.parameters():
                parameter.data.mul_(0.985)

    def rate(step: int) -> float:
        return 0.1 if step < 200 else 1e-6

    fit(run, model, torch.optim.SGD(model.parameters(), lr=0.1), objective, rate=rate, begin=fade)


def _large_gates(run: Run) -> None:
    model, x = Gates(gain=2.0), 4 * torch.randn(64, 32, generator=torch.Generator().manual_seed(run.seed))

    def objective() -> Tensor:
        return nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))

    fit(run, model, torch.optim.SGD(model.parameters(), lr=1e-5), objective, clip=0.05)


def _saturating_game(run: Run) -> None:
    """A generator whose loss saturates once its discriminator has won."""
    model = nn.ModuleDict({"G": mlp(8, 32, 2), "D": mlp(2, 64, 64, 1)})
    slow = torch.optim.Adam(model["G"].parameters(), lr=2e-4)
    fast = torch.optim.Adam(model["D"].parameters(), lr=1e-2)
    softplus = nn.functional.softplus
    run.watch(model)
    while True:
        real, fake = torch.randn(64, 2) / 10 + 3, model["G"](torch.randn(64, 8))
        fast.zero_grad()
        loss = (softplus(-model["D"](real)) + softplus(model["D"](fake.detach()))).mean()
        loss.backward()
        fast.step()
        run.step(loss)
        slow.zero_grad()
        loss = -softplus(model["D"](model["G"](torch.randn(64, 8)))).mean()
        loss.backward()
        slow.step()
        run.step(loss)


def trainings() -> dict[str, Training]:
    """Return the trainings by name."""
    known = {program.name: program for program in PROGRAMS}
    found = {name: Training(known[name].faulty, known[name].steps) for name in (*_FAULTY, *_HEALTHY)}
    for name in _CLIPPED:
        found[f"{name}, auto-clip"] = Training(known[name].faulty, known[name].steps, clip=True)
    found["clip at a thousandth of the usual norm"] = Training(_own_clip(1e-3), 300)
    found["clip at the usual norm"] = Training(_own_clip(0.3), 300)
    found["clip that nothing reaches"] = Training(_own_clip(1e6), 600)
    found["three of four units silenced"] = Training(_units_silenced, 100)
    found["Adam at a rate of 3"] = Training(_adam_rate, 100)
    found["optimizer of the first layer only"] = Training(_stale_optimizer, 100)
    found["batch with NaN left out"] = Training(_batch_left_out, 100)
    found["weights that fade"] = Training(_faded, 650)
    found["gates that double"] = Training(_large_gates, 150)
    found["loss that saturates in a game"] = Training(_saturating_game, 800)
    found["loss that is no scalar"] = Training(_loss_unseen, 30)
    found["line search"] = Training(_line_search, 30, clip=True)
    return found
